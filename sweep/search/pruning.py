"""The rule of asynchronous successive halving, and the trials exempt from it."""

import math
from fractions import Fraction

from sweep.config.space import PruningConfig

GOLDEN = Fraction(618_033_988_749_895, 10**15)  # its multiples spread evenly over [0, 1)


def better(one: float, other: float, direction: str) -> bool:
    """Whether `one` beats `other`; NaN never does."""
    if math.isnan(one) or math.isnan(other):
        return not math.isnan(one)
    return one > other if direction == "maximize" else one < other


def prune(own: float, peers: list[float], direction: str, config: PruningConfig) -> bool:
    """Whether a trial with the value `own` ends at this epoch.

    Args:
        own: its value at the epoch.
        peers: values of all trials at the same epoch, its own included.
        direction: maximize or minimize.
        config: rule of the halving.
    """
    if len(peers) < config.after_trials:
        return False
    ahead = sum(better(peer, own, direction) for peer in peers)
    return ahead >= max(1, math.floor(len(peers) * config.keep))


def is_audited(number: int, seed: int, share: float) -> bool:
    """Whether a trial is never ended early, so that its end shows what pruning costs.

    Nothing decides about it but number and seed, so it is the same after every kill. Trials are chosen at equal
    distances: of any n trials, from the first one on, n * share are chosen, rounded in one way or the other. The seed
    moves them, within the later half of their distance: the first trials of a sweep have no peers and end nowhere.
    """
    exact, offset = Fraction(str(share)), (1 - seed * GOLDEN % 1) / 2
    return math.floor(exact * (number + 1) + offset) > math.floor(exact * number + offset)
