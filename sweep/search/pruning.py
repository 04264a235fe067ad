"""The rules of asynchronous successive halving, and the trials that are exempt from them.

With `kind: stop`, a trial that is not among the best at a rung ends there. With `kind: promote` it pauses, and is
promoted when it is among the best at its rung later, as in the paper (Li et al., 2020, algorithm 2). A difference that
is within the noise of the validation split decides nothing: such a trial continues, too. Which trials are paused
follows from what the study stores about each: the epoch at which it paused last, and the rung that it has passed.
"""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from optuna.trial import FrozenTrial, TrialState

from sweep.config.search import PruningConfig
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
# was exempted from pruning, and the standard errors of its objective by rung, as text.
PAUSED, PASSED, EXEMPTED, ERRORS = "paused", "passed", "spared", "errors"
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
    """What is known of the trials that reached a rung, by number."""

    values: Mapping[int, float]  # objectives
    errors: Mapping[int, float]  # their standard errors; 0 where they are unknown
    ends: Mapping[int, float]  # objectives of those that have trained to their end

    @classmethod
    def of(cls, runs: Sequence[FrozenTrial], epoch: int) -> "Rung":
        """Return the rung at an epoch.

        Without the audit an exempted trial would not have trained beyond its rung, so it is no peer any more. Neither
        is one that trains the configuration of another one again.
        """
        reached = {
            number: trial
            for number, trial in enumerate(runs)
            if epoch in trial.intermediate_values
            and epoch <= trial.user_attrs.get(EXEMPTED, epoch)
            and not is_repeat(trial)
        }
        return cls(
            {number: trial.intermediate_values[epoch] for number, trial in reached.items()},
            {number: trial.user_attrs.get(ERRORS, {}).get(str(epoch), 0.0) for number, trial in reached.items()},
            {number: trial.value for number, trial in reached.items() if trial.value is not None},
        )

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


def continues(number: int, rung: Rung, direction: str, rule: PruningConfig) -> bool:
    """Return whether a trial trains on after a rung.

    Args:
        number: of the trial.
        rung: all trials that reached it, this one included.
        direction: maximize or minimize.
        rule: settings of the halving.
    """
    if not rung.is_predictive(rule):
        return True
    if rule.kind == "promote":
        return number in best_at(rung, direction, rule)
    margin = rule.noise * rung.errors[number] * (1 if direction == "maximize" else -1)
    return not prune(rung.values[number] + margin, list(rung.values.values()), direction, rule)


def best_at(rung: Rung, direction: str, rule: PruningConfig) -> list[int]:
    """Return the numbers of the trials that are promoted from a rung, best first; on a tie the earlier one.

    These are the share `rule.keep`, and those that are behind its last one by no more than `rule.noise` of their
    standard errors; all of them where the rung does not predict the end.
    """
    ranked = by_value(rung.values, direction)
    if not rung.is_predictive(rule):
        return ranked
    if len(ranked) < rule.after_trials:
        return []
    count = max(1, math.floor(len(ranked) * rule.keep))
    last = rung.values[ranked[count - 1]]
    within = [n for n in ranked[count:] if abs(rung.values[n] - last) <= rule.noise * rung.errors[n]]
    return ranked[:count] + within


def by_value(values: Mapping[int, float], direction: str) -> list[int]:
    """Return numbers by their values, best first; NaN is last, and on a tie the earlier number comes first."""
    sign = -1 if direction == "maximize" else 1
    return sorted(values, key=lambda number: (math.isnan(values[number]), sign * values[number], number))


def promotable(runs: Sequence[FrozenTrial], rungs: Sequence[int], direction: str, rule: PruningConfig) -> int | None:
    """Return the paused trial that continues next: the best one at the highest rung where one is among the best."""
    for epoch in reversed(rungs):
        for number in best_at(Rung.of(runs, epoch), direction, rule):
            if is_paused(runs[number]) and runs[number].user_attrs[PAUSED] == epoch:
                return number
    return None


def to_finish(runs: Sequence[FrozenTrial], direction: str, rule: PruningConfig) -> int | None:
    """Return the paused trial that trains to its end when nothing else is left: the best one at the highest rung.

    There is none once `rule.finish` trials have trained to their end, or will.
    """
    finished = sum(
        trial.state == TrialState.COMPLETE
        or (trial.state == TrialState.RUNNING and trial.user_attrs.get(PASSED) == TO_THE_END)
        for trial in runs
        if not is_repeat(trial)
    )
    paused = {number: trial.user_attrs[PAUSED] for number, trial in enumerate(runs) if is_paused(trial)}
    if finished >= rule.finish or not paused:
        return None
    highest = max(paused.values())
    values = {number: runs[number].intermediate_values[highest] for number, at in paused.items() if at == highest}
    return by_value(values, direction)[0]
