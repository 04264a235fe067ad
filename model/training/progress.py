"""What a training has done so far, and which of its epochs is the best one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the driver of a sweep reads this module without torch
    from model.training.loss_accumulator import Sums

Metrics = dict[str, float]


class Objective(NamedTuple):
    """A metric of the validation split, and whether it should be large."""

    metric: str
    maximize: bool


LOWEST_LOSS = Objective("loss", maximize=False)


def best_epoch(curve: Mapping[int, float], maximize: bool) -> int:
    """Return the epoch with the best finite value; on a tie the earlier one, without any finite value the last.

    The training and the study choose with it alike.
    """
    values = [(-value if maximize else value, epoch) for epoch, value in curve.items() if math.isfinite(value)]
    return min(values, default=(0.0, max(curve)))[1]


@dataclass
class Progress:
    """The state of the loop: everything of a training that is neither a tensor nor a random state."""

    epoch: int = 0
    step: int = 0  # optimizer steps made in this epoch; all of them where only the evaluation is missing
    total_steps: int = 0
    examples: int = 0
    sums: "Sums" = field(default_factory=dict)  # of this epoch
    seconds: float = 0.0  # of training and evaluation, of all attempts up to their checkpoints
    data_wait: float = 0.0  # the part of them that was spent waiting for the next batch
    history: list[tuple[int, Metrics]] = field(default_factory=list)  # what was reported, by epoch
    ends: list[int] = field(default_factory=list)  # `examples` at the end of each epoch of the history
    times: list[float] = field(default_factory=list)  # time of day at the end of each epoch of the history
