"""What a device can do at most, and what a training step asks of it: the multiplications and additions of both.

Operations are counted as torch counts them (`FlopCounterMode`): those of the step as it runs, padding included,
attention as if it were not causal, and nothing of a recomputation.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.training.trainer import Trainer
from tests.bench.materials import train_steps
from tests.bench.measure import Cost, measured


def count_operations(trained: Trainer, steps: int) -> int:
    """Return the operations of the first steps of an epoch, which are made.

    The counter knows no attention whose heads share keys, but it knows the products that this consists of.
    """
    added = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}  # of their shapes
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=added) as counter:
        train_steps(trained, 0, steps)
    return int(counter.get_total_flops())


def matrix_product(side: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Return a function that multiplies two square matrices, 2 side^3 operations."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right


def clocked(work: Callable[[], object], device: str) -> Cost:
    """Return what some work takes, until the device has done it."""

    def to_the_end() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.synchronize()
    return measured(to_the_end)
