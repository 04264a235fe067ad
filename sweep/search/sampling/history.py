"""The history that a sampler learns from: the trials of a study in the search space as it is now.

The study stores what happened. A sampler reads a copy, in which trials that ran out of memory are infeasible ones.
Gaussian processes, CMA-ES and quasi-random sequences know no conditions and no pruned trials: for them, an axis that a
trial does not have gets a constant value, and a pruned trial ends with its last value.
"""

import math
from collections.abc import Mapping, Sequence

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.space import SEED, Stored, Value, encode
from sweep.search.cost import COSTS
from sweep.search.sampling.objectives import objective_values
from sweep.search.sampling.ties import REPEATS, is_repeat

INFEASIBLE = ("out of memory",)  # reasons of a failure that depend on the parameters, which a sampler should avoid
VERY_BAD = 1e30  # value of an objective that is not finite, which Optuna refuses
ENDED_WELL = (TrialState.COMPLETE, TrialState.PRUNED)


def params(config: Config, trial: FrozenTrial) -> dict[str, Value]:
    """Return the values of a trial by dotted key, those of axes that were added later included, and its fresh seed."""
    space, drawn = config.search.space, dict[str, Value]()
    for name, value in trial.params.items():
        key = name.partition("#")[0]
        drawn[key] = space[key].decode(value) if key in space else value
    if is_repeat(trial):
        drawn[SEED] = trial.user_attrs[REPEATS][1]
    return config.search.complete(drawn, flat(config))


def history(config: Config, trials: Sequence[FrozenTrial], first_only: bool = False) -> list[FrozenTrial]:
    """Return the trials as TPE should see them: one for each, so that the numbers stay the same.

    Args:
        config: of the sweep.
        trials: of its study.
        first_only: leave out all objectives but the first one.
    """
    space, seen = config.search.space, list[FrozenTrial]()
    avoid_infeasible = any(trial.state in ENDED_WELL for trial in trials)
    for trial in trials:
        values = {key: value for key, value in params(config, trial).items() if key in space}
        if trial.state == TrialState.WAITING or not all(space[key].contains(value) for key, value in values.items()):
            seen.append(create_trial(state=TrialState.FAIL))  # which samplers ignore
        # Until a trial has ended well, TPE would take the least bad of the infeasible trials for the best.
        elif trial.state == TrialState.FAIL and avoid_infeasible and trial.user_attrs.get("reason") in INFEASIBLE:
            seen.append(infeasible(config, values, trial.intermediate_values))
        else:
            ended = objectives(config, trial) if trial.state == TrialState.COMPLETE else None
            seen.append(
                create_trial(
                    state=trial.state,
                    values=ended[:1] if ended and first_only else ended,
                    params=encoded(values),
                    distributions=distributions(config, values),
                    intermediate_values=trial.intermediate_values,
                )
            )
    return seen


def objectives(config: Config, trial: FrozenTrial) -> list[float]:
    """Return the value of each objective of a complete trial; one that is not finite counts as very bad."""
    attributes = trial.user_attrs
    kept = attributes.get("kept", {}).get("metrics", {})
    metrics = attributes.get("metrics", {}) | {name: value for name, value in kept.items() if name not in COSTS}
    values = objective_values(config, float(trial.values[0]), metrics)
    worst = [-VERY_BAD if direction == "maximize" else VERY_BAD for direction in config.search.directions]
    return [value if math.isfinite(value) else bad for value, bad in zip(values, worst, strict=True)]


def infeasible(config: Config, values: Mapping[str, Value], reported: Mapping[int, float] | None = None) -> FrozenTrial:
    """Return a trial with values that a sampler should avoid."""
    return create_trial(
        state=TrialState.PRUNED,
        params=encoded(values),
        distributions=distributions(config, values),
        intermediate_values=dict(reported or {}),
        constraints={"memory": 1.0},
    )


def flattened(config: Config, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return a history without conditions and without pruned trials.

    A pruned trial has the value that it reported last, and an infeasible one the worst value of all.

    Args:
        config: of the sweep.
        trials: see `history`.
    """
    space = config.search.space
    constant = encoded({key: axis.inside() for key, axis in space.items()})
    values = [_values(trial) for trial in trials]
    known = [ended for ended in values if ended is not None]
    worst = [
        (min if direction == "maximize" else max)(of_trials)
        for direction, of_trials in zip(config.search.directions, zip(*known, strict=True), strict=False)
    ]
    flat_trials = list[FrozenTrial]()
    for trial, ended in zip(trials, values, strict=True):
        if not trial.params:
            flat_trials.append(trial)
            continue
        is_infeasible = any(violation > 0 for violation in trial.constraints.values())
        ends = trial.state in ENDED_WELL and bool(worst)
        flat_trials.append(
            create_trial(
                state=TrialState.COMPLETE if ends else trial.state,
                values=(worst if is_infeasible or ended is None else ended) if ends else None,
                params=constant | trial.params,
                distributions=distributions(config, space),
            )
        )
    return flat_trials


def _values(trial: FrozenTrial) -> list[float] | None:
    """Return what a trial is worth; None where that is unknown."""
    if trial.state == TrialState.COMPLETE:
        return list(trial.values)
    last = max(trial.intermediate_values, default=None)
    if trial.state != TrialState.PRUNED or trial.constraints or last is None:
        return None
    value = trial.intermediate_values[last]
    return None if math.isnan(value) else [value]


def distributions(config: Config, keys: Mapping[str, object]) -> dict[str, BaseDistribution]:
    """Return the Optuna distributions of axes."""
    return {key: config.search.space[key].distribution() for key in keys}


def encoded(values: Mapping[str, Value]) -> dict[str, Stored]:
    """Return values as Optuna stores them."""
    return {key: encode(value) for key, value in values.items()}
