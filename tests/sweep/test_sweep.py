"""A whole sweep under Ray, started from Python and extended by the command line; `tests/kill` is about kills.

One sweep carries all the checks, since starting Ray is what costs: two worker groups, Ray Data as the reader, four
kinds of trials, MLflow on SQLite. Every trial is then trained again without Ray, and must be equal bit for bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient

from data.corpus import synthetic
from data.preparation.build import prepare
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.execution.trial import run_trial
from tests.sweep.common import FROZEN, TUNED, sweep

TRIALS = 7
SAME = {
    "model.modality": "speech",
    "model.lora.rank": 4,
    "train.learning_rate": 3e-3,
    "model.cls": "none",
    "train.checkpoint_seconds": 300,
}
SCRIPT = """
import asyncio, sys
from sweep import run_sweep

async def cell():
    return run_sweep(sys.argv[1], overrides={"search.trials": int(sys.argv[3])}, out=sys.argv[2])

outcome = asyncio.run(cell())
print(repr(outcome))
sys.exit(outcome.exit_code)
"""
# The short form of tests/kill compares study, bits and MLflow in every run; here no kill hides what differs.
pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]


def settings(models: Path, shards: Path) -> dict[str, Any]:
    return {
        "name": "whole",
        "seed": 3,
        "data": {"shards": str(shards), "history": 1, "reader": "ray"},
        "tasks": {"forecast": 0.5},
        "model": {
            "encoder": {"path": str(models / "whisper")},
            "llm": {"path": str(models / "llm")},
            "lora": {"dropout": 0.1},
        },
        "storage": {"keep": None},
        "train": {"epochs": 3, "batch_size": 8, "checkpoint_steps": 5},
        "search": {
            "startup_trials": 3,
            "pruning": {"first_epoch": 1, "after_trials": 4},
            "space": {
                "model.modality": ["speech", "text"],
                "model.lora.rank": [2, 4],
                "train.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
                "model.trainable": {"choices": [FROZEN, TUNED], "when": {"model.modality": ["speech"]}},
                "model.cls": ["none", "before", "after"],
                "train.checkpoint_seconds": [300, 301],
            },
            # The same training as first and later trial: nothing may remain of those in between. No sweep trains a
            # configuration twice, so they differ in what no result depends on.
            "points": [
                {**SAME, "model.trainable": FROZEN},
                {**SAME, "model.modality": "text"},
                {**SAME, "model.trainable": TUNED},
                {**SAME, "train.learning_rate": 9e-3, "model.trainable": TUNED, "model.cls": "after"},
                {**SAME, "model.trainable": FROZEN, "train.checkpoint_seconds": 301},
            ],
        },
    }


def sweep_json(*words: str | Path) -> Any:
    return json.loads(sweep(*words, "--json").out)


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that had ended, and was then extended."""
    root = tmp_path_factory.mktemp("sweep")
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), root / "shards")
    (config := root / "whole.yaml").write_text(yaml.safe_dump(settings(models, shards.folder)))
    (script := root / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    folder = root / "runs" / "whole"
    for command, last in (
        ([script, config, folder, str(TRIALS - 2)], "Outcome('done', exit_code=0, "),
        (["-m", "sweep", "run", config, "--out", folder, "--trials", str(TRIALS)], "done: "),
    ):
        run = [sys.executable, *command]
        ended = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=400, check=False)
        assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]
        assert ended.stdout.splitlines()[-1].startswith(last)
        status = sweep_json("status", folder)
        (root / f"after-{len(status['trials'])}.json").write_text(json.dumps(status))
    return folder


def test_every_trial_ended_once_and_extending_kept_it(finished: Path) -> None:
    after = sweep_json("status", finished)
    assert [trial["number"] for trial in after["trials"]] == list(range(TRIALS))
    assert {trial["state"] for trial in after["trials"]} <= {"COMPLETE", "PRUNED"}
    before = json.loads((finished.parents[1] / f"after-{TRIALS - 2}.json").read_text())
    assert before["trials"] == after["trials"][: TRIALS - 2]


class EnoughError(Exception):
    """Ends a training at the epoch at which the trial of the sweep was pruned."""


def test_every_trial_equals_its_training_without_ray(finished: Path, tmp_path: Path) -> None:
    """First or later in its worker group, in either group, fed by Ray Data or from the local shards."""
    states = {}
    for trial in sweep_json("status", finished)["trials"]:
        folder = finished / "trials" / f"{trial['number']:04d}"
        states[trial["number"]] = state = torch.load(folder / "checkpoint.pt", weights_only=True)
        epochs = state["progress"]["epoch"]
        assert (epochs == 3) == (trial["state"] == "COMPLETE")

        def report(epoch: int, metrics: dict[str, Any], last: int = epochs) -> None:
            if epoch == last:
                raise EnoughError

        alone = tmp_path / folder.name
        with pytest.raises(EnoughError):
            run_trial(resolve(load(str(folder / "config.yaml"))), alone, report, "local", "cpu")
        again = torch.load(alone / "checkpoint.pt", weights_only=True)
        assert again["digest"] == state["digest"], f"trial {trial['number']}"
        clock = {"seconds": 0, "data_wait": 0}
        histories = ([row[1] | clock for row in one["progress"]["history"]] for one in (again, state))
        assert next(histories) == next(histories)
    if states[0]["progress"]["epoch"] == states[4]["progress"]["epoch"]:
        assert states[0]["digest"] == states[4]["digest"]
    assert len({state["digest"] for state in states.values()}) >= TRIALS - 2


def test_mlflow_has_one_parent_and_one_run_per_trial(finished: Path) -> None:
    client = MlflowClient(f"sqlite:///{finished.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("whole")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert len(runs) == TRIALS + 1
    for trial in sweep_json("status", finished)["trials"]:
        run = client.get_run(trial["mlflow_run_id"])
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}[trial["state"]]
        assert run.data.params.items() >= {key: str(value) for key, value in trial["params"].items()}.items()
        points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "macro_f1")}
        assert len(points) == trial["epochs"]
        assert points[max(points)] == trial["value"]
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        figures = {"confusion_matrix.png", "forecast_confusion_matrix.png"}
        assert artifacts >= {"config.yaml", "predictions.json", "forecast_predictions.json", *figures}


def test_best_trial_evaluates_to_its_value(finished: Path) -> None:
    best = sweep_json("best", finished)
    assert best["config"]["model"]["lora"]["rank"] == best["params"]["model.lora.rank"]
    complete = [trial for trial in sweep_json("status", finished)["trials"] if trial["state"] == "COMPLETE"]
    assert best["value"] == max(trial["value"] for trial in complete)
    result = sweep_json("evaluate", finished, "--split", "val")
    assert result["macro_f1"] == pytest.approx(best["value"], abs=1e-9)
    assert result["forecast/macro_f1"] == pytest.approx(best["metrics"]["forecast/macro_f1"], abs=1e-9)


def test_finished_sweep_starts_no_ray_and_stays_as_it_is(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    journal = (finished / "study.journal").read_bytes()
    run = ("run", finished.parents[1] / "whole.yaml", "--out", finished, "--trials", TRIALS)
    again, refused = sweep(*run), sweep(*run, "--set", "train.epochs=9")
    assert (again.code, "starting Ray" in again.out) == (0, False)
    assert (refused.code, "train.epochs: 3 → 9" in refused.err) == (2, True)
    assert (finished / "study.journal").read_bytes() == journal


def test_no_process_is_left_running(finished: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        assert str(finished) not in " ".join(process.info["cmdline"] or [])
