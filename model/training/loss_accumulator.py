"""What the steps of a training sum up to: it stays on the device until it is read, so that no step waits for it.

Legend: N numbers of a step, S steps, L losses, B examples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.errors import UserError
from model.config import LossConfig
from model.objectives.losses import Losses
from model.runtime.device import on_device
from model.runtime.distributed import sum_numbers

Sums = dict[str, list[float]]  # task/loss → [sum, predicted tokens]


class NonFiniteError(UserError):
    """The loss or a gradient is not a finite number; neither its update nor a later one was made."""

    in_every_worker = True  # it is looked for after the sums over workers
    reason = "non-finite"


class Step(NamedTuple):
    """A step of which the device has yet to tell the numbers."""

    number: int  # from 1, over all epochs
    rate: float  # of learning
    tokens: dict[str, int]  # predicted, by task
    total: Tensor  # the loss that was minimised, of all workers
    norm: Tensor  # of the gradient
    sums_N: Tensor  # of every loss of every task, of this worker


class LossAccumulator:
    """The sums of every loss of every task, over steps.

    Args:
        tasks: of the model.
        config: which losses there are.
        device: where they are computed.
    """

    def __init__(self, tasks: Sequence[str], config: LossConfig, device: torch.device) -> None:
        self.tasks, self.device = list(tasks), device
        losses = ["next_token"] + [name for name in ("distillation", "hidden") if getattr(config, name) > 0]
        self.names = [(task, loss) for task in tasks for loss in losses]  # in an order that all workers share
        self.unread: list[Step] = []

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Zeros: a total, and sums_N."""
        total_and_sums_N = torch.zeros(1 + len(self.names), dtype=torch.float64, device=self.device)
        return total_and_sums_N[0], total_and_sums_N[1:]

    def by_task(self, losses: Losses, tasks: Sequence[str]) -> Tensor:
        """The sums_N of a micro-batch, given its losses and the task of each of its examples."""
        values_LB = torch.stack(list(losses.by_name().values())).double()
        own_TB = on_device([[task == own for own in tasks] for task in self.tasks], self.device)
        return torch.where(own_TB[:, None], values_LB, 0.0).sum(-1).flatten()

    def read(self, sums: Sums) -> float:
        """Wait for the device, and add what it has computed since the last time.

        All workers have to read after the same step.

        Returns:
            The loss of the last step; nan if all was read before.

        Raises:
            NonFiniteError: at the first step that was not sound.
        """
        steps, self.unread, total = self.unread, [], math.nan
        if not steps:
            return total
        summed_SN = sum_numbers(torch.stack([step.sums_N for step in steps]))
        told_SN = torch.stack([torch.stack([step.total, step.norm.double()]) for step in steps])
        for step, (total, norm, *values) in zip(steps, torch.cat([told_SN, summed_SN], dim=1).tolist(), strict=True):
            if not math.isfinite(total) or not math.isfinite(norm):
                raise NonFiniteError(
                    f"non-finite {'gradient' if math.isfinite(total) else 'loss'} at step {step.number}"
                    f", learning rate {step.rate:.3g}; lower train.learning_rate"
                )
            for (task, loss), value in zip(self.names, values, strict=True):
                entry = sums.setdefault(f"{task}/{loss}", [0.0, 0.0])
                entry[0], entry[1] = entry[0] + value, entry[1] + step.tokens[task]
        return total


def means(sums: Mapping[str, Sequence[float]], first: str) -> dict[str, float]:
    """Mean per token over an epoch, of every loss by itself; those of the first task go without its name."""
    found = {}
    for name, (value, count) in sums.items():
        shown = name.removesuffix("/next_token").removeprefix(first).strip("/")
        found[f"train_loss/{shown}".rstrip("/")] = value / count
    return found
