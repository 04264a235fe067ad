"""The rules of asynchronous successive halving, and the trials that are exempt from them.

With `kind: stop`, a trial that is not among the best at a rung ends there. With `kind: promote` it pauses, and is
promoted when it is among the best at its rung later, as in the paper (Li et al., 2020, algorithm 2). Which trials are
paused follows from what the study stores about each: the epoch at which it paused last, and the rung it has passed.

With `promote`, trials are compared with those of their branch only: trials with the same values on the axes that others
depend on, such as the modality. Learning curves cross between branches more than within one.
"""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from optuna.trial import FrozenTrial, TrialState

from data.formats import format_rank
from sweep.config.schema import Config
from sweep.config.search import PruningConfig
from sweep.search.sampling.history import params
from sweep.search.sampling.ties import is_repeat

GOLDEN = Fraction(618_033_988_749_895, 10**15)  # its multiples spread evenly over [0, 1)


def better(value: float, reference: float, direction: str) -> bool:
    """Return whether `value` beats `reference`; NaN beats nothing."""
    if math.isnan(value) or math.isnan(reference):
        return not math.isnan(value)
    return value > reference if direction == "maximize" else value < reference


def prune(value: float, peers: list[float], direction: str, config: PruningConfig) -> bool:
    """Return whether the rule ends a trial at a rung.

    Args:
        value: objective of the trial at this epoch.
        peers: objectives of all trials at the same epoch, `value` included.
        direction: maximize or minimize.
        config: settings of the halving.
    """
    if len(peers) < config.after_trials:
        return False
    ahead = sum(better(peer, value, direction) for peer in peers)
    return ahead >= max(1, math.floor(len(peers) * config.keep))


def is_audited(number: int, seed: int, share: float) -> bool:
    """Return whether a trial is exempt from pruning, so that its end shows what pruning costs.

    Only the trial's number and the sweep's seed decide, so the answer is the same after every kill. The exempt trials
    are evenly spaced: of the first n trials, n * share are exempt, rounded up or down. The seed shifts them within the
    later half of the spacing, because the first trials of a sweep have no peers and are never pruned.
    """
    exact, offset = Fraction(str(share)), (1 - seed * GOLDEN % 1) / 2
    return math.floor(exact * (number + 1) + offset) > math.floor(exact * number + offset)


# User attributes of a trial: the epoch at which it paused last, the last rung that it has passed, the epoch at which it
# was exempted from pruning, and, by rung as text, what is compared there (where that is not the objective) and its
# standard error.
PAUSED, PASSED, EXEMPTED, COMPARED, ERRORS = "paused", "passed", "spared", "compared", "errors"
TO_THE_END = 10**9  # value of PASSED: of a trial that does not pause any more


def is_paused(trial: FrozenTrial) -> bool:
    """Return whether a trial waits at a rung for its promotion."""
    attributes = trial.user_attrs
    return trial.state == TrialState.RUNNING and bool(attributes.get(PAUSED, 0) > attributes.get(PASSED, 0))


def as_history(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as the sampler should see it: one that was compared at a rung tells as much as a pruned one."""
    if trial.state != TrialState.RUNNING or not {PAUSED, PASSED} & trial.user_attrs.keys():
        return trial
    shown = copy.copy(trial)
    shown.state = TrialState.PRUNED
    return shown


class Rung(NamedTuple):
    """What is known of the trials of a branch that reached a rung, by number; more is better."""

    values: Mapping[int, float]  # of what is compared
    errors: Mapping[int, float]  # their standard errors; 0 where they are unknown
    ends: Mapping[int, float]  # objectives of those that have trained to their end

    @classmethod
    def all_at(cls, runs: Sequence[FrozenTrial], epoch: int, config: Config) -> "list[Rung]":
        """Return the rung of each branch at an epoch.

        Without the audit an exempted trial would not have trained beyond its rung, so it is no peer any more. Neither
        is one that trains the configuration of another one again.
        """
        search, branches = config.search, dict[str, dict[int, tuple[float, float, float | None]]]()
        branching, by_objective = search.branching, search.compared == search.metric
        sign = 1 if search.direction == "maximize" else -1
        for number, trial in enumerate(runs):
            attributes = trial.user_attrs
            values = trial.intermediate_values if by_objective else attributes.get(COMPARED, {})
            value = values.get(epoch if by_objective else str(epoch))
            if value is None or epoch > attributes.get(EXEMPTED, epoch) or is_repeat(trial):
                continue
            # An axis that was added later is not among the parameters that are stored.
            drawn = trial.params if all(key in trial.params for key in branching) else params(config, trial)
            branches.setdefault(repr([drawn.get(key) for key in branching]), {})[number] = (
                (sign if by_objective else -1) * value,
                attributes.get(ERRORS, {}).get(str(epoch), 0.0),
                None if trial.value is None else sign * trial.value,
            )
        return [
            cls(
                {number: value for number, (value, _, _) in branch.items()},
                {number: error for number, (_, error, _) in branch.items()},
                {number: end for number, (_, _, end) in branch.items() if end is not None},
            )
            for branch in branches.values()
        ]

    @classmethod
    def of(cls, number: int, runs: Sequence[FrozenTrial], epoch: int, config: Config) -> "Rung":
        """Return the rung of the branch of a trial that has reached it."""
        return next(rung for rung in cls.all_at(runs, epoch, config) if number in rung.values)

    @classmethod
    def of_paused(cls, runs: Sequence[FrozenTrial], config: Config) -> "dict[int, Rung]":
        """Return the rung at which each paused trial waits, by number."""
        paused = {number: trial.user_attrs[PAUSED] for number, trial in enumerate(runs) if is_paused(trial)}
        rungs = [(epoch, rung) for epoch in set(paused.values()) for rung in cls.all_at(runs, epoch, config)]
        return {number: rung for epoch, rung in rungs for number in rung.values if paused.get(number) == epoch}

    def describe(self, number: int, metric: str) -> str:
        """Return the rank of a trial by a metric, in words."""
        return f"ranked {format_rank(self.rank(number))} of {len(self.values)} by {metric}"

    def rank(self, number: int) -> int:
        """Return the rank of a trial, from 1."""
        return 1 + sum(better(value, self.values[number], "maximize") for value in self.values.values())

    def is_predictive(self, rule: PruningConfig) -> bool:
        """Return whether the order at the rung is that at the end in enough pairs of trials, see `rule.agreement`.

        Pairs whose ends differ by no more than `rule.noise` standard errors say nothing. Equal values at the rung count
        half.
        """
        if not rule.agreement:
            return True
        agree, pairs = 0.0, 0
        for first, second in itertools.combinations(self.ends, 2):
            difference = self.ends[first] - self.ends[second]
            if abs(difference) > rule.noise * max(self.errors[first], self.errors[second]):
                early = self.values[first] - self.values[second]
                agree, pairs = agree + (0.5 if early == 0 else float((early > 0) == (difference > 0))), pairs + 1
        return min(len(self.ends), pairs) >= rule.after_trials and agree >= rule.agreement * pairs


def continues(number: int, rung: Rung, rule: PruningConfig) -> bool:
    """Return whether a trial trains on after a rung.

    Args:
        number: of the trial.
        rung: all trials of its branch that reached it, this one included.
        rule: settings of the halving.
    """
    if not rung.is_predictive(rule):
        return True
    if rule.kind == "promote":
        return number in best_at(rung, rule)
    margin = rule.noise * rung.errors[number]
    return not prune(rung.values[number] + margin, list(rung.values.values()), "maximize", rule)


def best_at(rung: Rung, rule: PruningConfig) -> list[int]:
    """Return the numbers of the trials that are promoted from a rung, best first; on a tie the earlier one.

    These are the share `rule.keep`, and those that are behind its last one by no more than `rule.noise` of their
    standard errors; all of them where the rung does not predict the end.
    """
    ranked = sorted(rung.values, key=lambda number: (math.isnan(rung.values[number]), -rung.values[number], number))
    if not rung.is_predictive(rule):
        return ranked
    if len(ranked) < rule.after_trials:
        return []
    count = max(1, math.floor(len(ranked) * rule.keep))
    last = rung.values[ranked[count - 1]]
    within = [n for n in ranked[count:] if abs(rung.values[n] - last) <= rule.noise * rung.errors[n]]
    return ranked[:count] + within


def promotable(runs: Sequence[FrozenTrial], config: Config, rule: PruningConfig) -> int | None:
    """Return the paused trial that continues next: a trial that is among the best of its branch at the highest rung."""
    for epoch in reversed(config.search.rungs(config.train.epochs)):
        for rung in Rung.all_at(runs, epoch, config):
            for number in best_at(rung, rule):
                if is_paused(runs[number]) and runs[number].user_attrs[PAUSED] == epoch:
                    return number
    return None


def to_finish(runs: Sequence[FrozenTrial], config: Config, rule: PruningConfig) -> int | None:
    """Return the paused trial that trains to its end when nothing else is left: of those at the highest rung, the first
    one in its branch.

    There is none once `rule.finish` trials have trained to their end, or will.
    """
    finished = sum(
        trial.state == TrialState.COMPLETE
        or (trial.state == TrialState.RUNNING and trial.user_attrs.get(PASSED) == TO_THE_END)
        for trial in runs
        if not is_repeat(trial)
    )
    if finished >= rule.finish:
        return None
    order = {
        number: (-runs[number].user_attrs[PAUSED], rung.rank(number) / len(rung.values), number)
        for number, rung in Rung.of_paused(runs, config).items()
    }
    return min(order, key=order.__getitem__, default=None)
