"""What MLflow's table of runs sorts, filters and compares: single numbers, parameters and tags of a trial and a sweep.

A curve shows in that table with its last value only, so the best of each metric is a metric of its own.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from model.training.metrics_log import Point
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.search.pruning import better
from sweep.search.study import TrialRecord, best_first

BEST, OBJECTIVE = "best_", "objective"
# Of the validation split; those of later tasks have the task before them, those of a role or subset have it behind.
MORE = re.compile(r"([a-z_]+/)?((accuracy|macro_f1|weighted_f1)(_.+)?|bleu|rouge_l)")
LESS = re.compile(r"([a-z_]+/)?(loss|total_loss|perplexity|ece)")


def is_summary(name: str) -> bool:
    """Whether a metric sums up a run, and so is in no curve that a trial wrote."""
    return name == OBJECTIVE or name.startswith(BEST)


def params(config: Config, entry: TrialRecord) -> dict[str, Any]:
    """The value of every axis, so that runs can be compared on all of them.

    A trial outside the condition of an axis ran with the sweep's own setting, which is then the value;
    `unvaried` names such axes.
    """
    base = flat(config)
    return {key: base[key] for key in config.search.space} | entry.params


def unvaried(config: Config, entry: TrialRecord) -> list[str]:
    """Axes whose condition did not hold for a trial."""
    return [key for key in config.search.space if key not in entry.params]


def start_tags(config: Config, entry: TrialRecord, codes: Sequence[str]) -> dict[str, str]:
    """What is known of a trial when it begins.

    Args:
        config: of the sweep.
        entry: of the trial.
        codes: that ran it, see `sweep.changes.code_version`.
    """
    seed = entry.params.get("seed", config.seed)
    told = {"sweep.trial": str(entry.number), "sweep.seed": str(seed), "sweep.code": ", ".join(codes)}
    fixed = unvaried(config, entry)
    return told | ({"sweep.unvaried": ", ".join(fixed)} if fixed else {})


def end_tags(entry: TrialRecord, attempts: int | None) -> dict[str, str]:
    """How a trial ended; `sweep.rung` is the epoch that it reached, where pruned ones were judged last."""
    told = {
        "state": entry.state,
        "why": entry.why,
        "reason": entry.reason,
        "rung": max(entry.curve, default=0),
        "attempts": attempts,
    }
    return {f"sweep.{name}": str(value) for name, value in told.items() if value is not None}


def trial_metrics(config: Config, entry: TrialRecord, points: Iterable[Point]) -> dict[str, float]:
    """`best_<metric>` over the epochs of a trial that has ended, each in its own direction, and its `objective`.

    Of a failed trial there is no objective: nothing that sorts by it should put one first.

    Args:
        config: of the sweep.
        entry: of the trial.
        points: of its curves.
    """
    metric, direction = config.search.metric, config.search.direction
    found: dict[str, float] = {}
    study = [(metric, value, direction) for value in entry.curve.values()]
    curves = [(point.name, point.value, _direction(point.name)) for point in points if point.name != metric]
    for name, value, way in [*study, *curves]:
        key = f"{BEST}{name}"
        if way is not None and math.isfinite(value) and (key not in found or better(value, found[key], way)):
            found[key] = value
    if entry.state in ("COMPLETE", "PRUNED") and entry.value is not None and math.isfinite(entry.value):
        found[OBJECTIVE] = entry.value
    return found


def sweep_metrics(config: Config, entries: Sequence[TrialRecord]) -> dict[str, float]:
    """The best complete trial of a sweep, and its value; empty before there is one.

    There is no `objective`, or the sweep's run would stand among its trials where they are sorted by it.
    """
    best = next(iter(best_first(config, entries)), None)
    if best is None or best.value is None:
        return {}
    return {f"{BEST}{config.search.metric}": best.value, f"{BEST}trial": float(best.number)}


def _direction(name: str) -> str | None:
    """Whether more or less of a metric is better; None where neither is a goal."""
    if name.startswith("train_"):
        return None
    return "maximize" if MORE.fullmatch(name) else "minimize" if LESS.fullmatch(name) else None
