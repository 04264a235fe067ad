"""Further seeds for the best configurations, as far as they are tied within noise.

The best of many trainings is partly luck. A share of a sweep, `search.tie_share`, therefore goes to trainings of its
best configurations with other seeds, once the rest of it is spent: each to the one with the fewest trainings among
those whose mean is behind the best one's by no more than a standard error of the difference. This is a race (Maron and
Moore, "Hoeffding Races", 1994) with the error of normal values. The error is that between seeds, pooled over all
configurations that were trained more than once; until there are several, that of the validation sessions counts as
well. The runner-up is trained again in any case, so that there is something to estimate it from. Where nothing is tied,
the search draws further trials.

Such a training is a trial of the study, with the values of another one and a seed of its own. The seeds are those of
`sweep confirm`, which uses these trainings.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from optuna.trial import FrozenTrial, TrialState, create_trial

from data.errors import UserError
from sweep.config.schema import Config
from sweep.config.space import SEED
from sweep.search.candidates import untrained
from sweep.search.cost import Spending, spent_share

REPEATS = "repeats"  # user attribute of a trial: [number of the trial that it trains again, seed]
ERROR = "error"  # user attribute of a trial: standard error of its value, by session
FIRST_SEED = 1000  # fresh seeds start here
SESSIONS = 2  # trainings that the error by session counts as, beside those that were seen


class Training(Spending, Protocol):
    """What is read of a trial."""

    @property
    def number(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def value(self) -> float | None: ...
    @property
    def repeats(self) -> int | None: ...
    @property
    def error(self) -> float: ...


T = TypeVar("T", bound=Training)


class Trained(NamedTuple):
    """A configuration of a search, with all its trainings."""

    number: int  # of its first trial
    values: list[float]  # of the complete trainings
    started: int  # trainings, failed ones included

    @property
    def mean(self) -> float:
        """Return the mean value."""
        return sum(self.values) / len(self.values)


def is_repeat(trial: FrozenTrial) -> bool:
    """Return whether a trial trains the configuration of another one with a fresh seed."""
    return REPEATS in trial.user_attrs


def fresh_seeds(config: Config, count: int) -> list[int]:
    """Return seeds that no trial of the search had.

    Raises:
        UserError: the search draws from the seeds that are reserved for this.
    """
    axis = config.search.space.get(SEED)
    candidates = range(FIRST_SEED, FIRST_SEED + count + len((axis and axis.choices) or []) + 1)
    used = {seed for seed in candidates if seed == config.seed or (axis is not None and axis.contains(seed))}
    fresh = [seed for seed in candidates if seed not in used][:count]
    if len(fresh) < count:
        raise UserError(
            f"search.space.{SEED}: seeds from {FIRST_SEED} on are reserved for `sweep confirm`; use lower seeds"
        )
    return fresh


def reserved(config: Config) -> int:
    """Return how many trials of a sweep are kept for further seeds: none that a point or a whole finite space needs."""
    search = config.search
    wanted = math.floor(search.tie_share * search.trials)
    if wanted == 0:
        return 0
    space = untrained(config, (), search.trials + 1)
    needed = max(len(search.points), len(space) if space is not None and len(space) <= search.trials else 0)
    return max(0, min(wanted, search.trials - needed))


def are_due(config: Config, trials: Sequence[Training], is_over: bool = False) -> bool:
    """Return whether the trials that come next are further seeds, if anything is tied.

    Args:
        config: of the sweep.
        trials: of its study, by number.
        is_over: whether the search draws no more trials in any case.
    """
    search, repeats = config.search, sum(trial.repeats is not None for trial in trials)
    if search.tie_share == 0 or repeats >= (kept := reserved(config)):
        return False
    searched = len(trials) - repeats
    return is_over or searched >= search.trials - kept or spent_share(config, trials) >= 1 - search.tie_share


def by_mean(config: Config, trials: Sequence[T]) -> list[Trained]:
    """Return the configurations that were trained to their end, the one with the best mean first."""
    sign = -1 if config.search.direction == "maximize" else 1
    groups: dict[int, list[T]] = {}
    for trial in trials:
        groups.setdefault(trial.number if trial.repeats is None else trial.repeats, []).append(trial)
    trained = [
        Trained(
            number,
            [trial.value for trial in group if trial.state == "COMPLETE" and trial.value is not None],
            len(group),
        )
        for number, group in groups.items()
    ]
    known = [configuration for configuration in trained if configuration.values]
    return sorted(known, key=lambda configuration: (sign * configuration.mean, configuration.number))


def noise(trained: Sequence[Trained], trials: Sequence[Training]) -> float:
    """Return the standard deviation between trainings of a configuration, see the module."""
    squares = sum((value - configuration.mean) ** 2 for configuration in trained for value in configuration.values)
    degrees = sum(len(configuration.values) - 1 for configuration in trained)
    by_session = next((trial.error for trial in trials if trial.number == trained[0].number), 0.0)
    weight = SESSIONS if by_session else 0
    return math.sqrt((weight * by_session**2 + squares) / (weight + degrees)) if weight + degrees else 0.0


def tied(config: Config, trials: Sequence[Training]) -> list[Trained]:
    """Return the configurations that may be the best one, best first; the first one alone where it leads clearly.

    Args:
        config: of the sweep.
        trials: of its study, by number.
    """
    trained = by_mean(config, trials)
    if len(trained) < 2:
        return trained
    best, deviation = trained[0], noise(trained, trials)

    def is_tied(other: Trained) -> bool:
        error = deviation * math.sqrt(1 / len(best.values) + 1 / len(other.values))
        return abs(best.mean - other.mean) <= error

    runner_up = min(len(best.values), len(trained[1].values)) < 2
    return [best, *(other for index, other in enumerate(trained[1:]) if is_tied(other) or (index == 0 and runner_up))]


def next_repeat(config: Config, trials: Sequence[Training], is_over: bool = False) -> tuple[int, int] | None:
    """Return the configuration that is trained next and its seed, as (number, seed); None where none is.

    Args:
        config: of the sweep.
        trials: of its study, by number.
        is_over: see `are_due`.
    """
    candidates = tied(config, trials) if are_due(config, trials, is_over) else []
    if len(candidates) < 2:
        return None
    chosen = min(candidates, key=lambda configuration: configuration.started)
    return chosen.number, fresh_seeds(config, chosen.started)[-1]


def repeat(trial: FrozenTrial, number: int, seed: int) -> FrozenTrial:
    """Return the trial that trains the configuration of another one, which has a number, with a seed."""
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={REPEATS: [number, seed]},
    )
