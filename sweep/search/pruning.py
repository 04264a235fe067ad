"""The rule of asynchronous successive halving, and the trials that are exempt from it."""

import math
from fractions import Fraction

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
