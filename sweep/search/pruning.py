"""The rules of asynchronous successive halving, and the trials that are exempt from them.

With `kind: stop`, a trial that is not among the best at a rung ends there. With `kind: promote` it pauses, and is
promoted when it is among the best at its rung later, as in the paper (Li et al., 2020, algorithm 2). Which trials are
paused follows from what the study stores about each: the epoch at which it paused last, and the rung beyond which it
may train.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from optuna.trial import FrozenTrial, TrialState

from sweep.config.space import PruningConfig

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


# User attributes of a trial: the epoch at which it paused last, the last rung that it has passed, and the epoch at
# which it was exempted from pruning.
PAUSED, PASSED, EXEMPTED = "paused", "passed", "spared"
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


def values_at(runs: Sequence[FrozenTrial], epoch: int) -> dict[int, float]:
    """Return the objectives at a rung by number, of the trials that reached it.

    Without the audit an exempted trial would not have trained beyond its rung, so it is no peer any more.
    """
    return {
        number: trial.intermediate_values[epoch]
        for number, trial in enumerate(runs)
        if epoch in trial.intermediate_values and epoch <= trial.user_attrs.get(EXEMPTED, epoch)
    }


def continues(number: int, values: Mapping[int, float], direction: str, rule: PruningConfig) -> bool:
    """Return whether a trial trains on after a rung.

    Args:
        number: of the trial.
        values: of all trials that reached the rung, see `values_at`.
        direction: maximize or minimize.
        rule: settings of the halving.
    """
    if rule.kind == "promote":
        return number in best_at(values, direction, rule)
    return not prune(values[number], list(values.values()), direction, rule)


def best_at(values: Mapping[int, float], direction: str, rule: PruningConfig) -> list[int]:
    """Return the numbers of the trials that continue from a rung, best first; on a tie the earlier one.

    Args:
        values: see `values_at`.
        direction: maximize or minimize.
        rule: settings of the halving.
    """
    if len(values) < rule.after_trials:
        return []
    return by_value(values, direction)[: max(1, math.floor(len(values) * rule.keep))]


def by_value(values: Mapping[int, float], direction: str) -> list[int]:
    """Return numbers by their values, best first; NaN is last, and on a tie the earlier number comes first."""
    sign = -1 if direction == "maximize" else 1
    return sorted(values, key=lambda number: (math.isnan(values[number]), sign * values[number], number))


def promotable(runs: Sequence[FrozenTrial], rungs: Sequence[int], direction: str, rule: PruningConfig) -> int | None:
    """Return the paused trial that continues next: the best one at the highest rung where one is among the best."""
    for epoch in reversed(rungs):
        for number in best_at(values_at(runs, epoch), direction, rule):
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
    )
    paused = {number: trial.user_attrs[PAUSED] for number, trial in enumerate(runs) if is_paused(trial)}
    if finished >= rule.finish or not paused:
        return None
    highest = max(paused.values())
    values = {number: runs[number].intermediate_values[highest] for number, at in paused.items() if at == highest}
    return by_value(values, direction)[0]
