"""The sampler: draws the parameters of a new trial as a pure function of configuration, seed and the trials so far.

The study stores what happened. TPE reads a copy of the history in memory, which shows what it should learn from: trials
that ran out of memory as infeasible ones, and earlier trials in the search space as it is now. Values that cannot fit
into memory by the plan are drawn in that copy only and drawn again, so they use up no trial.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.trial import FrozenTrial, TrialState, create_trial

from data.errors import UserError
from sweep.compat import FIXED_PARAMS
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.space import Scalar

INFEASIBLE = ("out of memory",)  # reasons of a failure that depend on the parameters, which TPE should avoid
ENDED_WELL = (TrialState.COMPLETE, TrialState.PRUNED)
TRIES = 100  # draws for a trial, of which one must fit; TPE makes half of them, since it may repeat itself
Fits = Callable[[dict[str, Scalar]], bool]


def draw(config: Config, trials: Sequence[FrozenTrial], fits: Fits = lambda values: True) -> FrozenTrial:
    """Return a new running trial with all its values; those of a point if one is left.

    Args:
        config: of the sweep, with the space to draw from.
        trials: all trials of the study, in order.
        fits: returns whether a trial with some values may start.

    Raises:
        UserError: none of many draws fits.
    """
    point, values = _draw_fitting(config, trials, fits)
    space = config.search.space
    names = {key: _stored_name(key, space[key].distribution(), trials) for key in values}
    return create_trial(
        state=TrialState.RUNNING,
        params={name: values[key] for key, name in names.items()},
        distributions={name: space[key].distribution() for key, name in names.items()},
        system_attrs={FIXED_PARAMS: point} if point is not None else {},
    )


def _draw_fitting(
    config: Config, trials: Sequence[FrozenTrial], fits: Fits
) -> tuple[dict[str, Scalar] | None, dict[str, Scalar]]:
    """Return the point that the next trial takes, if one is left, and the values of the trial."""
    # Each trial has a sampler with its own seed, so that a resumed search draws what an uninterrupted one would.
    sampler = optuna.samplers.TPESampler(
        seed=int(np.random.SeedSequence([config.seed, len(trials)]).generate_state(1)[0]),
        n_startup_trials=config.search.startup_trials,
        constant_liar=True,
        multivariate=True,
        group=True,
    )
    copy = optuna.create_study(direction=config.search.direction, sampler=sampler)
    copy.add_trials(history(config, trials))
    avoid_infeasible = any(trial.state in ENDED_WELL for trial in trials)
    for tried, point in enumerate([*points_left(config, trials), *[None] * TRIES]):
        if point is not None:
            copy.enqueue_trial(point)
        if tried > TRIES // 2:
            copy.sampler = optuna.samplers.RandomSampler(seed=len(trials))
        trial = copy.ask()
        values = config.search.suggest(trial, flat(config))
        if fits(values):
            return point, values
        copy.tell(trial, state=TrialState.FAIL)
        if avoid_infeasible:
            copy.add_trial(_infeasible(config, values))
    raise UserError(
        f"search.space: none of {TRIES} draws fits into memory by the plan; leave out the values that it excludes"
    )


def points_left(config: Config, trials: Iterable[FrozenTrial]) -> list[dict[str, Scalar]]:
    """Return the points that no trial has taken yet. A point that cannot fit is skipped, so it stays in the list."""
    left = list(config.search.points)
    for trial in trials:
        if trial.state != TrialState.WAITING and trial.system_attrs.get(FIXED_PARAMS) in left:
            left.remove(trial.system_attrs[FIXED_PARAMS])
    return left


def params(config: Config, trial: FrozenTrial) -> dict[str, Scalar]:
    """Return the values of a trial by dotted key, those of axes that were added later included."""
    drawn = {name.partition("#")[0]: value for name, value in trial.params.items()}
    return config.search.complete(drawn, flat(config))


def history(config: Config, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials as TPE should see them: one for each, so that the numbers stay the same."""
    space, seen = config.search.space, list[FrozenTrial]()
    avoid_infeasible = any(trial.state in ENDED_WELL for trial in trials)
    for trial in trials:
        values = {key: value for key, value in params(config, trial).items() if key in space}
        if trial.state == TrialState.WAITING or not all(space[key].contains(value) for key, value in values.items()):
            seen.append(create_trial(state=TrialState.FAIL))  # which TPE ignores
        # Until a trial has ended well, TPE would take the least bad of the infeasible trials for the best.
        elif trial.state == TrialState.FAIL and avoid_infeasible and trial.user_attrs.get("reason") in INFEASIBLE:
            seen.append(_infeasible(config, values, trial.intermediate_values))
        else:
            seen.append(
                create_trial(
                    state=trial.state,
                    value=trial.value if trial.state == TrialState.COMPLETE else None,
                    params=values,
                    distributions={key: space[key].distribution() for key in values},
                    intermediate_values=trial.intermediate_values,
                )
            )
    return seen


def _infeasible(
    config: Config, values: Mapping[str, Scalar], reported: Mapping[int, float] | None = None
) -> FrozenTrial:
    """Return a trial with values that TPE should avoid."""
    return create_trial(
        state=TrialState.PRUNED,
        params=dict(values),
        distributions={key: config.search.space[key].distribution() for key in values},
        intermediate_values=dict(reported or {}),
        constraints={"memory": 1.0},
    )


def _stored_name(key: str, distribution: BaseDistribution, trials: Iterable[FrozenTrial]) -> str:
    """Return the name of an axis in the study.

    Optuna keeps a parameter to one list of choices, so an axis whose choices grew gets the key with a number after it.
    """
    stored: dict[str, BaseDistribution] = {}
    for trial in trials:
        stored = trial.distributions | stored
    names = (key if version == 1 else f"{key}#{version}" for version in count(1))
    return next(name for name in names if name not in stored or _compatible(stored[name], distribution))


def _compatible(stored: BaseDistribution, distribution: BaseDistribution) -> bool:
    try:
        check_distribution_compatibility(stored, distribution)
    except ValueError:
        return False
    return True
