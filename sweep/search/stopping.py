"""How many trials a search has: `search.trials`, unless its budget is spent or more would gain less than the noise.

The rule about the gain is ours. The best of n trials grows about as much from n / 2 to n trials as from n to 2 n: the
largest of n values of a distribution with an exponential tail grows with log(n) (Gumbel, "Statistics of Extremes",
1958). So the gain of the last doubling estimates that of the next one. The noise between two trainings of a
configuration is estimated without a second training: from how much the objective jumps between the later epochs of a
trial, in the median over the complete trials. `search.stop_when: noise` ends the search where the gain is smaller.

The study stores the decision with the number of the last trial, so it is the same after any kill. It counts until more
trials are added.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

from sweep.config.schema import Config
from sweep.config.search import LEAST_EPOCHS
from sweep.search.candidates import untrained
from sweep.search.cost import spent_budget
from sweep.search.sampling.ties import Training, next_repeat

MOST_COUNTED = 10_000  # trials of a finite space that are counted
LEAST = 16  # trials that must have ended


class Ending(Training, Protocol):
    """What the rule reads of a trial."""

    @property
    def stopped(self) -> str: ...


def ended_early(config: Config, trials: Sequence[Ending]) -> str | None:
    """Return why no more trials start, in words; None where they do.

    Args:
        config: of the sweep.
        trials: of its study, by number.
    """
    if (why := spent_budget(config, trials)) is not None:
        return why
    return stopped_by_noise(config, trials)


def stopped_by_noise(config: Config, trials: Sequence[Ending]) -> str | None:
    """Return why the search stopped by itself, in words; None where it did not."""
    drawn = [trial for trial in trials if trial.repeats is None]
    return (drawn[-1].stopped or None) if drawn and config.search.stop_when else None


def total_trials(config: Config, trials: Sequence[Ending]) -> int:
    """Return the number of trials of a sweep: `search.trials`, or fewer where the search ends before.

    It does where a finite space has no more different trials, and see `ended_early`. Further seeds of tied
    configurations may come after that; how many is not known before they have ended.

    Args:
        config: of the sweep.
        trials: of its study.
    """
    missing = config.search.trials - len(trials)
    if missing <= 0:
        return config.search.trials
    if spent_budget(config, trials) is not None:
        return len(trials)
    if stopped_by_noise(config, trials) is None:
        most = min(missing, MOST_COUNTED)
        left = untrained(config, {config.search.same(trial.params) for trial in trials}, most)
        if left is None or len(left) == most:
            return config.search.trials
        if left:
            return len(trials) + len(left)
    return len(trials) + (next_repeat(config, trials, is_over=True) is not None)


def gain_below_noise(config: Config, trials: Sequence[Ending]) -> str | None:
    """Return that more trials would gain less than the noise, in words; None where they may gain more.

    Args:
        config: of the sweep.
        trials: of its study, by number.
    """
    ended = [trial for trial in trials if trial.state not in ("RUNNING", "PAUSED") and trial.repeats is None]
    if len(ended) < LEAST:
        return None
    gain, noise = doubling_gain(config, ended), noise_between_trainings(ended)
    if gain is None or noise is None or gain >= noise:
        return None
    return (
        f"search.stop_when: the last {len(ended) - len(ended) // 2} trials gained {gain:.3f} of "
        f"{config.search.metric}, less than the noise between trainings ({noise:.3f})"
    )


def doubling_gain(config: Config, trials: Sequence[Ending]) -> float | None:
    """Return by how much the second half of some trials beats the best of the first half; None where none is known."""
    sign = 1 if config.search.direction == "maximize" else -1
    values = [
        sign * trial.value if trial.state == "COMPLETE" and trial.value is not None else -math.inf for trial in trials
    ]
    half = len(values) // 2
    before, after = max(values[:half]), max(values)
    return after - before if math.isfinite(before) else None


def noise_between_trainings(trials: Sequence[Ending]) -> float | None:
    """Return the estimated standard deviation between two trainings; None where no complete trial has enough epochs."""
    jumps = [
        statistics.stdev(changes) / math.sqrt(2)
        for trial in trials
        if trial.state == "COMPLETE" and len(changes := _late_changes(trial.curve)) > 1
    ]
    return statistics.median(jumps) if jumps else None


def _late_changes(curve: Mapping[int, float]) -> list[float]:
    """Return the changes of the objective between the epochs of the later half of a trial."""
    values = [value for _, value in sorted(curve.items()) if math.isfinite(value)]
    if len(values) < LEAST_EPOCHS:
        return []
    late = values[(len(values) - 1) // 2 :]
    return [after - before for before, after in itertools.pairwise(late)]
