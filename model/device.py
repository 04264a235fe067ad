"""Numbers of the host, brought to the device: without waiting for what is computed there."""

from typing import Any

import torch
from torch import Tensor


def on_device(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers, lists of them, or an array.

    From pinned memory, which torch keeps until it has been read: a copy from elsewhere first waits until the device has
    computed all that it was given.
    """
    tensor = torch.tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
