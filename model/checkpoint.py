"""Checkpoints: what trains and the state of the loop, nothing that the base model's files hold already."""

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be used with this configuration, or cannot be read."""


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that differ from the base model: all parameters that train."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put trained tensors back.

    Raises:
        CheckpointError: the names or shapes are not exactly those that train in this model.
    """
    own = trained_tensors(model)
    different = sorted(own.keys() ^ tensors.keys()) or sorted(
        name for name, tensor in own.items() if tensor.shape != tensors[name].shape
    )
    if different:
        raise CheckpointError(f"the checkpoint belongs to another configuration: {different[0]} differs")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of tensors by name: equal digests mean equal bits."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, flush it, and rename it: it is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; it may hold tensors and plain values only, never code.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train first, or name another trial") from None
    except Exception as error:
        kind = type(error).__name__  # its text advises to load without the safeguards
        raise CheckpointError(f"{path}: damaged checkpoint ({kind}); remove it to start this trial again") from None
    if not isinstance(state, dict) or not {"tensors", "progress"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of a trial; name the checkpoint.pt of one")
    return state


def seed_everything(seed: int) -> None:
    """Seed every generator that initialisation, dropout or augmentation draws from."""
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
