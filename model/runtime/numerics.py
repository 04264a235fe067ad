"""Numerical settings of a process that computes what a trial would compute."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def trial_numerics(threads: int, device: str, precision: str) -> Iterator[None]:
    """Compute without gradients as a trial does, so that the result is equal to the bit."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        yield
