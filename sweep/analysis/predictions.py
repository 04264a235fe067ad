"""The predictions of a trial's last evaluation, and the 95 % intervals of its metrics."""

import contextlib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from data.atomic import write_file
from data.errors import UserError, reason
from model.evaluation.bootstrap import Interval, SummedMetric, interval, standard_error, summed_metric
from model.evaluation.metrics import Record
from sweep.config.paths import share_folder, trial_folder
from sweep.config.search import SHARES
from sweep.config.version import code_version
from sweep.search.study import TrialRecord

INTERVALS = "intervals.json"  # beside the predictions
TOLERANCE = 1e-6  # between a metric and the value of its interval, which are summed in another order
Predictions = Mapping[str, tuple[list[str], list[Record]]]  # by task: its labels and what was predicted


class IntervalCache(BaseModel):
    """The computed intervals of a trial, valid for the modification time of its predictions and a code version."""

    of: tuple[int, str]
    intervals: dict[str, Interval | None] = {}


def read_predictions(folder: Path, name: str = "predictions.json") -> dict[str, tuple[list[str], list[Record]]]:
    """Return the labels and the predictions of a trial's last evaluation by task; empty where there was none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / name
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        records = [Record(**{**row, "scores": tuple(row["scores"])}) for row in content["records"]]
        return {
            task: (labels, [record for record in records if record.task == task])
            for task, labels in content["labels"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged ({reason(error)}); remove it to continue without this trial's intervals"
        ) from None


def trial_interval(folder: Path, trial: TrialRecord, name: str) -> Interval | None:
    """Return the interval of a trial's metric on the validation split; None where its predictions give none.

    Intervals are cached beside the predictions where that is writable, since bootstrapping hundreds of trials takes
    minutes.
    """
    path = _newest(trial_folder(folder.absolute(), trial.number)) / "predictions.json"
    # The predictions of a running trial may come from a later epoch than its last report.
    if trial.state == "RUNNING" or not path.exists():
        return None
    changed = path.stat().st_mtime_ns
    cache_path, cache = path.with_name(INTERVALS), IntervalCache(of=(changed, code_version()))
    with contextlib.suppress(OSError, ValueError):
        stored = IntervalCache.model_validate_json(cache_path.read_bytes())
        cache = stored if stored.of == cache.of else cache
    if name not in cache.intervals:
        cache.intervals[name] = _computed_interval(path.parent, changed, name)
        with contextlib.suppress(OSError):
            write_file(cache_path, cache.model_dump_json())
    return cache.intervals[name]


def interval_around(folder: Path, trial: TrialRecord, name: str, value: float) -> Interval | None:
    """Return the interval of a trial's metric if it belongs to a value that the study knows.

    Where the report of an epoch was lost, the predictions may come from an epoch that the study does not know.
    """
    limits = trial_interval(folder, trial, name)
    return None if limits is None or abs(limits.value - value) > TOLERANCE else limits


@functools.lru_cache(maxsize=4096)
def _computed_interval(folder: Path, _: int, name: str) -> Interval | None:
    return interval_of(read_predictions(folder), name, {})


def interval_of(predictions: Predictions, name: str, roles: Mapping[str, Sequence[str]]) -> Interval | None:
    """Return the interval of a metric; None where it has none.

    Args:
        predictions: labels and records by task.
        name: of the metric as in `summarise`, the task included.
        roles: the labels that each role may carry; only the F1 of a role needs them.
    """
    metric, records = _of_metric(predictions, name, roles)
    return interval([records], metric) if metric and records else None


def _newest(folder: Path) -> Path:
    """Return the folder with the newest predictions of a trial: its own, or that of a share of the data."""
    parts = [share_folder(folder, share) for share in reversed(SHARES)]
    return next((part for part in parts if (part / "predictions.json").exists()), folder)


def objective_error(folder: Path, number: int, name: str) -> float:
    """Return the standard error of a metric in a trial's last evaluation; 0 where its predictions give none."""
    try:
        metric, records = _of_metric(read_predictions(_newest(trial_folder(folder, number))), name, {})
    except (UserError, OSError):
        return 0.0
    error = standard_error(records, metric) if metric and records else 0.0
    return error if math.isfinite(error) else 0.0


def _of_metric(
    predictions: Predictions, name: str, roles: Mapping[str, Sequence[str]]
) -> tuple[SummedMetric | None, list[Record]]:
    """Return a metric as a function of sums, and the records that it is computed from."""
    task, _, metric = name.rpartition("/")
    labels, records = predictions.get(task or next(iter(predictions), ""), ([], []))
    return summed_metric(metric, labels, roles), records
