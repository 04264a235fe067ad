"""The sampler: draws the parameters of a new trial as a pure function of configuration, seed and the trials so far.

The study stores what happened. TPE reads a copy of the history in memory, which shows what it should learn from: trials
that ran out of memory as infeasible ones, and earlier trials in the search space as it is now. Values that another
trial has, and those that cannot fit into memory by the plan, are drawn in that copy only and drawn again, so they use
up no trial. What is left of a finite space is enumerated where drawing does not find it.
"""

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from data.errors import UserError
from sweep.compat import FIXED_PARAMS
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.space import Stored, Value, Values, encode
from sweep.search.candidates import MOST, untrained
from sweep.search.sampling.advice import Advice, EarlierSweep
from sweep.search.sampling.history import ENDED_WELL, encoded, infeasible, params
from sweep.search.sampling.samplers import choose, study_to_draw_from

TRIES = 100  # draws for a trial, of which one must be new and fit; TPE makes half of them, since it may repeat itself
FEW_TRIES = 10  # the same where few combinations are left, of which one is chosen at random otherwise
TOO_LARGE = "not started: does not fit into memory by the plan"
Fits = Callable[[dict[str, Value]], bool]


class Draw(NamedTuple):
    """The values of a new trial."""

    point: dict[str, Stored] | None  # which the trial takes
    values: Values
    fits: bool = True


def draw(
    config: Config,
    trials: Sequence[FrozenTrial],
    fits: Fits = lambda values: True,
    earlier: Sequence[EarlierSweep] = (),
) -> FrozenTrial | None:
    """Return a new running trial with all its values; those of a point if one is left.

    No trial has the values of another one. Of a finite space, values that cannot fit come last, as a failed trial.

    Args:
        config: of the sweep, with the space to draw from.
        trials: all trials of the study, in order.
        fits: returns whether a trial with some values may start.
        earlier: sweeps that the search learns from.

    Returns:
        The trial; None if every combination of a finite space has a trial.

    Raises:
        UserError: none of many draws fits.
    """
    drawn = _draw(config, trials, fits, earlier)
    if drawn is None:
        return None
    space = config.search.space
    names = {key: _stored_name(key, space[key].distribution(), trials) for key in drawn.values}
    return create_trial(
        state=TrialState.RUNNING if drawn.fits else TrialState.FAIL,
        params={name: encode(drawn.values[key]) for key, name in names.items()},
        distributions={name: space[key].distribution() for key, name in names.items()},
        system_attrs={FIXED_PARAMS: drawn.point} if drawn.point is not None else {},
        user_attrs={} if drawn.fits else {"why": TOO_LARGE, "reason": "out of memory"},
    )


def depends_on_results(config: Config, trials: Sequence[FrozenTrial], earlier: Sequence[EarlierSweep]) -> bool:
    """Return whether the values of the next trial depend on the results of those before it."""
    if choose(config).name in ("random", "qmc", "grid") or len(trials) < config.search.startup_trials:
        return bool(earlier)
    point = next(iter(points_left(config, trials)), None)
    return point is None or len(untrained(config, (), 2, point) or ()) != 1


def _draw(config: Config, trials: Sequence[FrozenTrial], fits: Fits, earlier: Sequence[EarlierSweep]) -> Draw | None:
    """Return the values of the next trial, and the point that it takes, if one is left."""
    trained = _trained(config, trials)
    left = untrained(config, trained, MOST)
    if left == []:
        return None
    drawing = _Drawing(config, trials, fits, trained)
    if (drawn := drawing.of_points() or drawing.advised(earlier) or drawing.of_sampler(left)) is not None:
        return drawn
    if fitting := [values for values in left or [] if fits(values)]:
        return Draw(None, random.Random(drawing.seed).choice(fitting))
    if left is not None and len(left) < MOST:
        return Draw(None, left[0], fits=False)
    raise UserError(
        f"search.space: none of {TRIES} draws fits into memory by the plan; leave out the values that it excludes"
    )


class _Drawing:
    """The ways to the values of one trial, which share a copy of the history."""

    def __init__(self, config: Config, trials: Sequence[FrozenTrial], fits: Fits, trained: Collection[str]) -> None:
        self.config, self.trials, self.fits, self.trained = config, trials, fits, trained
        # Each trial has a sampler with its own seed, so that a resumed search draws what an uninterrupted one would.
        self.seed = int(np.random.SeedSequence([config.seed, len(trials)]).generate_state(1)[0])
        self.kind = choose(config).name
        self.copy = study_to_draw_from(config, self.kind, trials, self.seed)
        self.avoid_infeasible = any(trial.state in ENDED_WELL for trial in trials)

    def is_new(self, values: Values) -> bool:
        """Return whether no trial has some values."""
        return self.config.search.same(values) not in self.trained

    def ask(self, point: Mapping[str, Value] | None = None) -> tuple[Values, Literal["good", "repeated", "too large"]]:
        """Draw values, and return them with what they are; those that lack a value of the point count as repeated."""
        if point is not None:
            self.copy.enqueue_trial(encoded(point))
        trial = self.copy.ask()
        values = self.config.search.suggest(trial, flat(self.config))
        is_new = self.is_new(values) and (point or {}).items() <= values.items()
        if is_new and self.fits(values):
            return values, "good"
        if self.kind != "gp":  # which would draw the same again, and stays away from trials that run
            self.copy.tell(trial, state=TrialState.FAIL)
        if is_new and self.avoid_infeasible and self.kind == "tpe":
            self.copy.add_trial(infeasible(self.config, values))
        return values, "too large" if is_new else "repeated"

    def of_points(self) -> Draw | None:
        """Return the next point, with values for what it leaves open."""
        for point in points_left(self.config, self.trials):
            for _ in range(_tries(completions := untrained(self.config, self.trained, MOST, point))):
                values, verdict = self.ask(point)
                if verdict == "good":
                    return Draw(encoded(point), values)
                if verdict == "too large":  # so are its other values, as a rule
                    break
            if fitting := [values for values in completions or [] if self.fits(values)]:
                return Draw(encoded(point), random.Random(self.seed).choice(fitting))
        return None

    def advised(self, earlier: Sequence[EarlierSweep]) -> Draw | None:
        """Return what earlier sweeps expect most of: one of several draws, or of their own trials."""
        advice = Advice(self.config, earlier, self.trials)
        if advice.draws < 2:
            return None
        candidates = [values for values, verdict in (self.ask() for _ in range(advice.draws)) if verdict == "good"]
        base = flat(self.config)
        candidates += [
            values
            for values in advice.known
            if self.config.search.covers(values, base) and self.is_new(values) and self.fits(values)
        ]
        return Draw(None, candidates[int(np.argmax(advice.surrogate.expected(candidates)))]) if candidates else None

    def of_sampler(self, left: Sequence[Values] | None) -> Draw | None:
        """Return new values that the sampler draws; None where it finds none.

        Args:
            left: the combinations that no trial has, if all are known.
        """
        tries = 0 if self.kind == "grid" else _tries(left)
        for tried in range(tries):
            if tried == (FEW_TRIES if self.kind == "gp" else tries) // 2:
                self.copy.sampler = RandomSampler(seed=len(self.trials))
            values, verdict = self.ask()
            if verdict == "good":
                return Draw(None, values)
        return None


def _tries(left: Sequence[Values] | None) -> int:
    """Return how often values are drawn before one of the combinations that are left is chosen, if all are known."""
    return TRIES if left is None or len(left) == MOST else FEW_TRIES


def _trained(config: Config, trials: Iterable[FrozenTrial]) -> set[str]:
    """Return what the trials so far are, see `SearchConfig.same`."""
    return {config.search.same(params(config, trial)) for trial in trials if trial.state != TrialState.WAITING}


def points_left(config: Config, trials: Sequence[FrozenTrial]) -> list[dict[str, Value]]:
    """Return the points that no trial has taken yet, without those whose values are only those of other trials.

    A point that cannot fit is skipped, so it stays in the list.
    """
    left = list(config.search.points)
    for trial in trials:
        point = next((point for point in left if encoded(point) == trial.system_attrs.get(FIXED_PARAMS)), None)
        if trial.state != TrialState.WAITING and point is not None:
            left.remove(point)
    trained = _trained(config, trials) if left else set[str]()
    return [point for point in left if untrained(config, trained, 1, point) != []]


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
