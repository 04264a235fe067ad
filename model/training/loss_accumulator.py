"""Sums of losses over optimizer steps: they stay on the device until they are read, so that no step waits for it.

Shapes: N sums of a step (one for every loss of every task), S steps, L losses, B examples, T tasks.
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
from model.runtime.distributed import sum_over_workers

Sums = dict[str, list[float]]  # task/loss → [sum, predicted tokens]


class NonFiniteError(UserError):
    """The loss or a gradient is not a finite number; neither its step nor a later one was made."""

    in_every_worker = True  # it is checked after the sums over workers
    reason = "non-finite"


class Step(NamedTuple):
    """An optimizer step whose numbers are still on the device."""

    number: int  # from 1, over all epochs
    learning_rate: float
    tokens: dict[str, int]  # predicted, by task
    total: Tensor  # the loss that was minimised, of all workers
    norm: Tensor  # of the gradient
    sums_N: Tensor  # of this worker


class LossAccumulator:
    """Accumulates the sums of every loss of every task over optimizer steps.

    Args:
        tasks: of the model.
        config: of the losses.
        device: where they are computed.
    """

    def __init__(self, tasks: Sequence[str], config: LossConfig, device: torch.device) -> None:
        self.tasks, self.device = list(tasks), device
        losses = ["next_token"] + [name for name in ("distillation", "hidden") if getattr(config, name) > 0]
        self.names = [(task, loss) for task in tasks for loss in losses]  # in an order that all workers share
        self.unread: list[Step] = []

    def zeros(self) -> tuple[Tensor, Tensor]:
        """Return a total and sums_N, float64."""
        total_and_sums_N = torch.zeros(1 + len(self.names), dtype=torch.float64, device=self.device)
        return total_and_sums_N[0], total_and_sums_N[1:]

    def by_task(self, losses: Losses, tasks: Sequence[str]) -> Tensor:
        """Return the sums_N of a micro-batch, given its losses and the task of each of its examples."""
        values_LB = torch.stack(list(losses.by_name().values())).double()
        is_task_TB = on_device([[task == example_task for example_task in tasks] for task in self.tasks], self.device)
        return torch.where(is_task_TB[:, None], values_LB, 0.0).sum(-1).flatten()

    def read(self, sums: Sums) -> float:
        """Wait for the device, and add the unread steps to `sums`. All workers must read after the same step.

        Returns:
            The loss of the last step; nan if there is no unread step.

        Raises:
            NonFiniteError: for the first step whose loss or gradient is not finite.
        """
        steps, self.unread, total = self.unread, [], math.nan
        if not steps:
            return total
        summed_SN = sum_over_workers(torch.stack([step.sums_N for step in steps]))
        totals_S2 = torch.stack([torch.stack([step.total, step.norm.double()]) for step in steps])
        for step, (total, norm, *values) in zip(steps, torch.cat([totals_S2, summed_SN], dim=1).tolist(), strict=True):
            if not math.isfinite(total) or not math.isfinite(norm):
                raise NonFiniteError(
                    f"non-finite {'gradient' if math.isfinite(total) else 'loss'} at step {step.number}"
                    f", learning rate {step.learning_rate:.3g}; lower train.learning_rate"
                )
            for (task, loss), value in zip(self.names, values, strict=True):
                pair = sums.setdefault(f"{task}/{loss}", [0.0, 0.0])
                pair[0], pair[1] = pair[0] + value, pair[1] + step.tokens[task]
        return total


def means(sums: Mapping[str, Sequence[float]], first: str) -> dict[str, float]:
    """Return the mean of every loss per predicted token, over an epoch.

    Args:
        sums: by task/loss.
        first: the task whose metrics have no task in their names.
    """
    metrics = {}
    for name, (value, count) in sums.items():
        suffix = name.removesuffix("/next_token").removeprefix(first).strip("/")
        metrics[f"train_loss/{suffix}".rstrip("/")] = value / count
    return metrics
