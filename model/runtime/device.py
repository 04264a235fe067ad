"""Move values from the host to the device without waiting for the device."""

from typing import Any

import torch
from torch import Tensor

from data.loading.batching import PAD_TOLERANCE

GPU_PAD_TOLERANCE = 2048


def pad_tolerance(device: torch.device) -> int:
    """Return how many padded positions cost less than one more pass over the model, see `data.loading.batching`.

    A GPU receives the kernels of a pass one by one, some 10 us each, however little they compute: for 28 layers with
    LoRA that takes as long as an H100 needs for 2,000 to 3,000 positions.
    """
    return GPU_PAD_TOLERANCE if device.type == "cuda" else PAD_TOLERANCE


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return values (a number, nested lists, or an array) as a tensor on the device.

    The copy starts from pinned memory, which torch keeps until the copy is done: a copy from pageable memory first
    waits until the device has finished everything that was queued.
    """
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
