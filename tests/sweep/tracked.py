"""A sweep as MLflow shows it, for the tests of tracking."""

import json
import shutil
from math import nan
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.search.study import StudyStore, TrialRecord
from sweep.tracking.access import tracking_uri
from sweep.tracking.dataset import Corpus
from sweep.tracking.summary import params
from sweep.tracking.tracker import Tracker, mlflow_run_id
from tests.sweep.common import PREDICTIONS, ask, report, settings

DATA = Corpus(
    "synthetic",
    "f00d",
    ("change", "sustain", "neutral"),
    "datasets/synthetic",
    {"turns": {"train": 60, "val": 20, "test": 20}, "sessions": {"train": 6, "val": 2, "test": 2}},
)
CONFIG = settings(trials=4, pruning={"first_epoch": 1, "after_trials": 2, "audit": 0})
Point = tuple[int, float, float]  # step, seconds, value


def append(folder: Path, number: int, *points: Point) -> None:
    """Write what a trial writes after an epoch."""
    path = trial_folder(folder, number) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "config.yaml").write_text(f"name: trial {number}\n")  # as the driver does once the trial is stored
    with path.open("a") as file:
        for step, seconds, value in points:
            file.write(json.dumps({"time": seconds, "step": step, "values": {"loss": value, "f1": 1 - value}}) + "\n")


def make_sweep(folder: Path, database: Path) -> Path:
    """Make the folder of a sweep with a complete, a pruned, a failed and a running trial, and MLflow beside it."""
    shutil.copy(database, folder.parent)
    folder.mkdir()
    study = StudyStore.open(folder, CONFIG)
    ask(study, 4)
    report(study, 0, 0.9, 0.8)
    study.complete(0)
    assert report(study, 1, 0.1) == [True]
    study.fail(2, "lost")
    append(folder, 0, (16, 1000.25, 0.5), (32, 1001.5, 0.75))
    append(folder, 1, (16, 1002.0, 0.1))
    append(folder, 3, (16, 1003.0, nan), (32, 1004.0, 0.4))
    (trial_folder(folder, 0) / "predictions.json").write_text(json.dumps(PREDICTIONS))
    return folder


def track(folder: Path, config: Config = CONFIG, seconds: float = 60, corpus: Corpus = DATA) -> None:
    """Run a driver that has no trial to run."""
    tracker = Tracker(config, folder, corpus, every=0.05)
    tracker.start()
    assert tracker.finish(seconds), tracker.error


def runs(folder: Path) -> tuple[Run, list[Run]]:
    """Return the parent run, and its children by trial number."""
    client = MlflowClient(tracking_uri(folder))
    all_runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    [parent] = [run for run in all_runs if "mlflow.parentRunId" not in run.data.tags]
    children = sorted((run for run in all_runs if run is not parent), key=lambda run: int(run.data.tags["sweep.trial"]))
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
    return parent, children


def shown_params(trial: TrialRecord, config: Config = CONFIG) -> dict[str, str]:
    """Return every axis of the search as MLflow has it."""
    return {key: str(value) for key, value in params(config, trial).items()}


def curve(folder: Path, number: int, name: str = "loss") -> list[Point]:
    history = MlflowClient(tracking_uri(folder)).get_metric_history(mlflow_run_id(folder, number), name)
    return sorted((point.step, point.timestamp / 1000, point.value) for point in history)


def written(folder: Path, number: int, name: str = "loss") -> list[Point]:
    """Return the points that a trial wrote; of several lines of a step the first counts."""
    path, points = trial_folder(folder, number) / "metrics.jsonl", dict[int, Point]()
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        if name in line["values"]:
            points.setdefault(line["step"], (line["step"], line["time"], line["values"][name]))
    return [points[step] for step in sorted(points)]
