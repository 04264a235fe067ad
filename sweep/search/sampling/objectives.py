"""Several objectives: `search.metrics` with their directions, and the trials that no other one beats in all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from sweep.config.schema import Config


class Judged(Protocol):
    """What is read of a trial."""

    @property
    def number(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def value(self) -> float | None: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


T = TypeVar("T", bound=Judged)


def objective_values(config: Config, value: float, metrics: Mapping[str, float]) -> list[float]:
    """Return the value of each objective of a trial, NaN where it was not reported.

    Args:
        config: of the sweep.
        value: of the first objective.
        metrics: of the trial's result.
    """
    search, resources = config.search, config.resources
    known = dict(metrics)
    if "seconds" in metrics:
        known["gpu_seconds"] = metrics["seconds"] * resources.workers * resources.gpus_per_worker
    return [value, *(known.get(name, math.nan) for name in search.objectives[1:])]


def pareto_front(config: Config, trials: Sequence[T]) -> list[T]:
    """Return the complete trials that no other one beats: equal or better in all objectives, and better in one.

    They are in the order of the first objective, best first; none where there is only one objective.
    """
    search = config.search
    if len(search.objectives) == 1:
        return []
    signs = [1 if direction == "maximize" else -1 for direction in search.directions]
    scores = {
        trial.number: [
            sign * value
            for sign, value in zip(signs, objective_values(config, trial.value, trial.metrics), strict=True)
        ]
        for trial in trials
        if trial.state == "COMPLETE" and trial.value is not None
    }
    scores = {number: values for number, values in scores.items() if all(map(math.isfinite, values))}

    def is_beaten(values: list[float]) -> bool:
        return any(
            other != values and all(theirs >= ours for theirs, ours in zip(other, values, strict=True))
            for other in scores.values()
        )

    front = [trial for trial in trials if trial.number in scores and not is_beaten(scores[trial.number])]
    return sorted(front, key=lambda trial: [-value for value in scores[trial.number]])


def front_line(config: Config, trials: Sequence[T]) -> str | None:
    """Return the front in a sentence; None where there is none."""
    front = pareto_front(config, trials)
    if not front:
        return None
    numbers, names = ", ".join(f"#{trial.number}" for trial in front), " and ".join(config.search.objectives)
    return f"Pareto front: {numbers}; no trial is better in one of {names} without being worse in another"
