"""What must hold of MLflow after a sweep under fire: one run per trial, each point once, true statuses."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import ViewType

from sweep.search.study import TrialRecord
from sweep.tracking.summary import is_summary
from sweep.tracking.tracker import STATUS
from tests.kill.verdict import Row, lines

Key = tuple[str, int]  # metric and step


def mlflow_rows(trials: Mapping[int, TrialRecord], folder: Path, uri: str) -> list[Row]:
    """Compare what MLflow has with the study and the metrics logs.

    Args:
        trials: of the study.
        folder: of the sweep.
        uri: of MLflow's database.
    """
    client = MlflowClient(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = list(client.search_runs(ids, run_view_type=ViewType.ACTIVE_ONLY, max_results=1000))
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    known = Counter(run.data.tags.get("sweep.trial") for run in runs if run not in parents)
    children = {int(run.data.tags["sweep.trial"]): run for run in runs if run not in parents}
    return [
        Row("one MLflow run a trial", _runs(trials, known), f"{len(runs)} runs", "doubled"),
        Row("the parent run is FINISHED", [run.info.status for run in parents if run.info.status != "FINISHED"]),
        Row("true statuses", _statuses(trials, children)),
        *_points(client, trials, children, folder),
    ]


def _runs(trials: Mapping[int, TrialRecord], known: Counter[Any]) -> list[str]:
    return [f"trial {n}: {known[str(n)]} runs" for n in trials if known[str(n)] != 1] + [
        f"trial {n}: it is not in the study" for n in known if n is None or int(n) not in trials
    ]


def _statuses(trials: Mapping[int, TrialRecord], children: Mapping[int, Any]) -> list[str]:
    faults = []
    for number, run in children.items():
        expected = STATUS.get(trials[number].state) if number in trials else None
        if run.info.status != expected:
            faults.append(f"trial {number}: {run.info.status} in place of {expected}")
        elif not run.data.params.items() >= {key: str(value) for key, value in trials[number].params.items()}.items():
            faults.append(f"trial {number}: its parameters are {run.data.params}")
    return faults


def _points(
    client: MlflowClient, trials: Mapping[int, TrialRecord], children: Mapping[int, Any], folder: Path
) -> list[Row]:
    doubled, lost, count = [], [], 0
    for number in trials.keys() & children.keys():
        run, expected = children[number], _written(folder / "trials" / f"{number:04d}" / "metrics.jsonl")
        names = {name for name, _ in expected} | {name for name in run.data.metrics if not is_summary(name)}
        got = [point for name in names for point in client.get_metric_history(run.info.run_id, name)]
        counts = Counter((point.key, point.step) for point in got)
        count += len(counts)
        doubled += [f"trial {number}: {key} {times} times" for key, times in counts.items() if times > 1]
        values = {(point.key, point.step): point.value for point in got}
        lost += [f"trial {number}: {key} is missing" for key in expected.keys() - values.keys()]
        lost += [f"trial {number}: {key} is not in the metrics log" for key in values.keys() - expected.keys()]
        lost += [f"trial {number}: {k} differs" for k in values.keys() & expected.keys() if values[k] != expected[k]]
    return [
        Row("each MLflow point once", doubled, f"{count} points", "doubled"),
        Row("no hole in MLflow's metrics", lost, counts="lost"),
    ]


def _written(path: Path) -> dict[Key, float]:
    """Return every point of a trial; of repeated ones the first counts."""
    points: dict[Key, float] = {}
    for line in lines(path):
        for name, value in line["values"].items():
            if isinstance(value, int | float):
                points.setdefault((name, line["step"]), json.loads(json.dumps(float(value))))
    return points
