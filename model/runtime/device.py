"""Numbers of the host, brought to the device: without waiting for what is computed there."""

from typing import Any

import torch
from torch import Tensor

from data.loading.batching import PAD_TOLERANCE

SPARED_BY_GPU = 2048


def spared(device: torch.device) -> int:
    """Positions of padding that cost less than another pass over the model, see `data.plan`.

    A GPU is handed the kernels of a pass one by one, some 10 us each, however little they compute: for 28 layers with
    LoRA that is as long as an H100 takes for 2,000 to 3,000 positions.
    """
    return SPARED_BY_GPU if device.type == "cuda" else PAD_TOLERANCE


def on_device(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers, lists of them, or an array.

    From pinned memory, which torch keeps until it has been read: a copy from elsewhere first waits until the device has
    computed all that it was given.
    """
    tensor = torch.tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
