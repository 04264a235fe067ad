"""Seed all random number generators; save and restore their states."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict, cast

import numpy as np
import torch
from torch import Tensor


class RandomState(TypedDict):
    """The states of all generators of a process, in types that `checkpoint.load` accepts."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    cuda: Tensor | None  # of the current device


def seed_everything(seed: int) -> None:
    """Seed every generator that initialisation, dropout or augmentation uses."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_random_state() -> RandomState:
    """Return the states of all generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy = name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss
    return {
        "python": random.getstate(),
        "numpy": cast(tuple[str, Tensor, int, int, float], numpy),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: RandomState) -> None:
    """Restore what `get_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Let training not notice what is drawn within the context, by packages that are imported there, for example."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
