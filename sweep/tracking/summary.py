"""What MLflow's table of runs sorts, filters and compares: summary metrics, parameters and tags of trials and sweeps.

The table shows the last value of a metric only, so the best value of each metric is another metric.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from model.training.metrics_log import Point
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.space import Value
from sweep.search.pruning import better
from sweep.search.study import TrialRecord, best_first

if TYPE_CHECKING:
    from model.evaluation.bootstrap import Interval

BEST, OBJECTIVE = "best_", "objective"
LOWER, UPPER = f"{OBJECTIVE}_lower", f"{OBJECTIVE}_upper"  # 95 % limits of the objective
# Tags of `end_tags`.
ENDING = tuple(f"sweep.{name}" for name in ("state", "why", "reason", "rung", "share", "epoch", "attempts"))
PAUSING = ("sweep.state", "sweep.rung")  # tags of `pause_tags`
# Metrics of the validation split by direction; the task is a prefix, a role or subset is a suffix.
MORE = re.compile(r"([a-z_]+/)?((accuracy|macro_f1|weighted_f1)(_.+)?|bleu|rouge_l)")
LESS = re.compile(r"([a-z_]+/)?(loss|total_loss|perplexity|ece)")


def is_summary(name: str) -> bool:
    """Return whether a metric summarises a run, and so is not in the trial's metrics log."""
    return name in (OBJECTIVE, LOWER, UPPER) or name.startswith(BEST)


def params(config: Config, trial: TrialRecord) -> dict[str, Value]:
    """Return the value of every axis, so that runs can be compared on all of them.

    A trial outside the condition of an axis ran with the sweep's setting, which is then the value; `unvaried` returns
    such axes.
    """
    base = flat(config)
    return {key: base[key] for key in config.search.space} | trial.params


def unvaried(config: Config, trial: TrialRecord) -> list[str]:
    """Return the axes whose condition did not hold for a trial."""
    return [key for key in config.search.space if key not in trial.params]


def start_tags(config: Config, trial: TrialRecord, codes: Sequence[str]) -> dict[str, str]:
    """Return the tags of a trial that starts.

    Args:
        config: of the sweep.
        trial: the trial.
        codes: versions of the code that ran it, see `sweep.config.version.code_version`.
    """
    seed = trial.params.get("seed", config.seed)
    tags = {"sweep.trial": str(trial.number), "sweep.seed": str(seed), "sweep.code": ", ".join(codes)}
    if trial.repeats is not None:
        tags["sweep.repeats"] = str(trial.repeats)
    fixed = unvaried(config, trial)
    tags |= base_tags(trial)
    return tags | ({"sweep.unvaried": ", ".join(fixed)} if fixed else {})


def end_tags(trial: TrialRecord, attempts: int | None) -> dict[str, str]:
    """Return the tags of a trial that has ended.

    `sweep.rung` is its last epoch, `sweep.share` the share of the training groups then, `sweep.epoch` the epoch of its
    result.
    """
    tags = {
        "state": trial.state,
        "why": trial.why,
        "reason": trial.reason,
        "rung": max(trial.curve, default=0),
        "share": trial.share and f"{trial.share:g}",
        "epoch": trial.epoch or None,
        "attempts": attempts,
    }
    return {f"sweep.{name}": str(value) for name, value in tags.items() if value is not None} | base_tags(trial)


def pause_tags(trial: TrialRecord) -> dict[str, str]:
    """Return the tags of a trial that is paused."""
    return dict(zip(PAUSING, (trial.state, str(max(trial.curve))), strict=True))


def base_tags(trial: TrialRecord) -> dict[str, str]:
    """Return the digests of a trial's base models, as `sweep.base.llm`."""
    return {f"sweep.base.{setting.split('.')[1]}": str(base) for setting, base in trial.bases.items()}


def trial_metrics(
    config: Config, trial: TrialRecord, points: Iterable[Point], interval: "Interval | None" = None
) -> dict[str, float]:
    """Return `best_<metric>` over the epochs of an ended trial, each in its direction, and its `objective` with limits.

    The objective on shares of the data before the last one is another metric, `best_<metric>_share_<share>`. A failed
    trial has no objective, so that it is never first in a ranking.

    Args:
        config: of the sweep.
        trial: the trial.
        points: of its metrics log.
        interval: of its objective, if it has one.
    """
    metric, objective, share_at = config.search.metric, config.search.direction, config.search.share_at
    best: dict[str, float] = {}
    study = list[tuple[str, float, str]]()
    for epoch, value in trial.curve.items():
        share = share_at(epoch, config.train.epochs)
        name = metric if trial.share in (None, share) else f"{metric}_share_{share:g}"
        study.append((name, value, objective))
    logged = [(point.name, point.value, _direction(point.name)) for point in points if point.name != metric]
    for name, value, direction in [*study, *logged]:
        key = f"{BEST}{name}"
        if direction is None or not math.isfinite(value):
            continue
        if key not in best or better(value, best[key], direction):
            best[key] = value
    if trial.state in ("COMPLETE", "PRUNED") and trial.value is not None and math.isfinite(trial.value):
        best[OBJECTIVE] = trial.value
        if interval is not None and interval.low is not None and interval.high is not None:
            best |= {LOWER: interval.low, UPPER: interval.high}
    return best


def sweep_metrics(config: Config, trials: Sequence[TrialRecord]) -> dict[str, float]:
    """Return the best complete trial of a sweep and its value; empty before there is one.

    There is no `objective`, or the sweep's run would be ranked among its trials.
    """
    best = next(iter(best_first(config, trials)), None)
    if best is None or best.value is None:
        return {}
    return {f"{BEST}{config.search.metric}": best.value, f"{BEST}trial": float(best.number)}


def _direction(name: str) -> str | None:
    """Return whether a metric should be large or small; None if it is no goal."""
    if name.startswith("train_"):
        return None
    return "maximize" if MORE.fullmatch(name) else "minimize" if LESS.fullmatch(name) else None
