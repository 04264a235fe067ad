"""Drawing the parameters of a new trial: a pure function of configuration, seed and the trials so far.

TPE reads a copy of the history in memory, so the ledger holds what happened, and the sampler sees what it should learn
from it: trials that ran out of memory as infeasible ones, and former trials in the space as it is now. What cannot fit
by the plan is drawn in that copy only, and drawn again: it takes no trial's place.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.trial import FrozenTrial, TrialState, create_trial

from data.errors import UserError
from sweep.config.loader import flat
from sweep.config.schema import Config

INFEASIBLE = ("out of memory",)  # reasons of a failure that depend on the parameters, and that TPE is to avoid
FIXED = "fixed_params"  # where Optuna notes the values that a point gave
ENDED_WELL = (TrialState.COMPLETE, TrialState.PRUNED)
TRIES = 100  # draws for a trial, of which one must fit; half of them by TPE, which may insist
Fits = Callable[[dict[str, Any]], bool]


def draw(config: Config, trials: Sequence[FrozenTrial], fits: Fits = lambda values: True) -> FrozenTrial:
    """A new trial, running, with all its values; those of a point if one is left.

    Args:
        config: the sweep's, with the space to draw from.
        trials: all of the ledger, in order.
        fits: whether a trial with some values may start.

    Raises:
        UserError: none of many draws fits.
    """
    point, values = _fitting(config, trials, fits)
    drawn = {_stored_name(key, config.search.space[key].distribution(), trials): key for key in values}
    return create_trial(
        state=TrialState.RUNNING,
        params={name: values[key] for name, key in drawn.items()},
        distributions={name: config.search.space[key].distribution() for name, key in drawn.items()},
        system_attrs={FIXED: point} if point is not None else {},
    )


def _fitting(config: Config, trials: Sequence[FrozenTrial], fits: Fits) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A point, if it is one, and the values of the next trial."""
    sampler = _sampler(config, len(trials))
    view = optuna.create_study(direction=config.search.direction, sampler=sampler)
    view.add_trials(history(config, trials))
    learnt = any(trial.state in ENDED_WELL for trial in trials)
    for tried, point in enumerate([*points_left(config, trials), *[None] * TRIES]):
        if point is not None:
            view.enqueue_trial(point)
        if tried > TRIES // 2:
            view.sampler = optuna.samplers.RandomSampler(seed=len(trials))
        trial = view.ask()
        values = config.search.suggest(trial, flat(config))
        if fits(values):
            return point, values
        view.tell(trial, state=TrialState.FAIL)
        if learnt:
            view.add_trial(_infeasible(config, values))
    raise UserError(
        f"search.space: of {TRIES} draws none fits into memory by the plan; leave out the values that it excludes"
    )


def points_left(config: Config, trials: Iterable[FrozenTrial]) -> list[dict[str, Any]]:
    """The points that no trial has taken yet. Those that cannot fit are passed over, so they stay."""
    left = list(config.search.points)
    for trial in trials:
        if trial.state != TrialState.WAITING and trial.system_attrs.get(FIXED) in left:
            left.remove(trial.system_attrs[FIXED])
    return left


def params(config: Config, trial: FrozenTrial) -> dict[str, Any]:
    """The values of a trial by dotted key, those of axes that came later included."""
    drawn = {name.partition("#")[0]: value for name, value in trial.params.items()}
    return config.search.complete(drawn, flat(config))


def history(config: Config, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """What TPE learns from, trial by trial, so that numbers stay as they are."""
    learnt = any(trial.state in ENDED_WELL for trial in trials)
    return [_seen(config, trial, learnt) for trial in trials]


def _seen(config: Config, trial: FrozenTrial, learnt: bool) -> FrozenTrial:
    space = config.search.space
    values = {key: value for key, value in params(config, trial).items() if key in space}
    if trial.state == TrialState.WAITING or not all(space[key].contains(value) for key, value in values.items()):
        return create_trial(state=TrialState.FAIL)  # which TPE ignores
    # Until a trial has ended well, TPE would take the least bad of the infeasible for good.
    if trial.state == TrialState.FAIL and learnt and trial.user_attrs.get("reason") in INFEASIBLE:
        return _infeasible(config, values, trial.intermediate_values)
    return create_trial(
        state=trial.state,
        value=trial.value if trial.state == TrialState.COMPLETE else None,
        params=values,
        distributions={key: space[key].distribution() for key in values},
        intermediate_values=trial.intermediate_values,
    )


def _infeasible(config: Config, values: Mapping[str, Any], reported: Mapping[int, float] | None = None) -> FrozenTrial:
    """A trial that TPE is to avoid."""
    return create_trial(
        state=TrialState.PRUNED,
        params=dict(values),
        distributions={key: config.search.space[key].distribution() for key in values},
        intermediate_values=dict(reported or {}),
        constraints={"memory": 1.0},
    )


def _sampler(config: Config, number: int) -> optuna.samplers.TPESampler:
    """A sampler of the trial's own, so that a resumed search draws what an uninterrupted one would."""
    return optuna.samplers.TPESampler(
        seed=int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]),
        n_startup_trials=config.search.startup_trials,
        constant_liar=True,
        multivariate=True,
        group=True,
    )


def _stored_name(key: str, distribution: BaseDistribution, trials: Iterable[FrozenTrial]) -> str:
    """Optuna holds a parameter to one list of choices: a list that grew has the key with a number behind it."""
    known: dict[str, BaseDistribution] = {}
    for trial in trials:
        known = trial.distributions | known
    names = (key if version == 1 else f"{key}#{version}" for version in count(1))
    return next(name for name in names if name not in known or _compatible(known[name], distribution))


def _compatible(one: BaseDistribution, other: BaseDistribution) -> bool:
    try:
        check_distribution_compatibility(one, other)
    except ValueError:
        return False
    return True
