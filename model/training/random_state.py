"""Seed all random generators; save and restore their states."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every generator that initialisation, dropout or augmentation draws from."""
    # Draws from Python's generator when it is first imported: in the middle of one trial, and not of the next.
    import sklearn.metrics  # noqa: F401

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator_state() -> dict[str, Any]:
    """The state of all generators, in types that `load` accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of the current device
    }


def restore_generators(state: dict[str, Any]) -> None:
    """The inverse of `generator_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
