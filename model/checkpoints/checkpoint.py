"""Checkpoints: what trains and the state of the loop, nothing that the base model's files hold already."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.atomic import commit, removed_afterwards
from data.errors import StorageError, UserError, storing
from model.checkpoints import checksum as sealed
from model.checkpoints.fencing import TrialLock

FILE, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged-{}.pt"
REMOVE = "remove it to start this trial again"


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


def restore(model: Any, state: dict[str, Any]) -> None:
    """Put a trial's tensors into its model, which must stand on the same parents.

    Raises:
        CheckpointError: see `load_tensors`; or a parent has changed since.
    """
    if len(model.parents) != len(state["parents"]):
        raise CheckpointError(
            f"the checkpoint belongs to another configuration: it stands on {len(state['parents'])} former trials, and "
            f"model.init_from gives {len(model.parents)}"
        )
    for now, then in zip(model.parents, state["parents"], strict=True):
        if now["digest"] != then["digest"]:
            raise CheckpointError(
                f"{now['path']}: has changed since this trial was started from it; put the former checkpoint back"
            )
    for setting, now in model.files.items():
        if state["files"].get(setting) != now:
            raise CheckpointError(
                f"{setting}: its file has changed since this trial was started; put the former one back"
            )
    load_tensors(model, state["tensors"])


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of tensors by name: equal digests mean equal bits."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def save(path: Path, state: dict[str, Any], attempt: TrialLock | None = None) -> None:
    """Write a checkpoint beside its name, flush it, and rename it; the one before is kept as PREVIOUS.

    A kill between any two steps leaves one of the two whole under its name, and a name never holds half a file.

    Args:
        path: of the checkpoint.
        state: tensors and plain values.
        attempt: that writes it; by default nobody else does.

    Raises:
        Superseded: a later attempt has begun; nothing was changed.
        StorageError: the disk is full, or cannot be written; the former checkpoints are as they were.
    """
    own = attempt or TrialLock.claim(path.parent)
    own.check()
    with storing(path), removed_afterwards(own.unfinished(path.name)) as unfinished:
        sealed.write(unfinished, state)
        with own.writing():
            _keep(path, own)
            commit(unfinished, path, durable=True)


def _keep(path: Path, attempt: TrialLock) -> None:
    """Name a checkpoint PREVIOUS, by a second name where the file system has such, so that it keeps its own."""
    if not path.exists():
        return
    with removed_afterwards(attempt.unfinished(PREVIOUS)) as second:  # a rename onto the same file leaves both names
        try:
            second.hardlink_to(path)
        except OSError:
            commit(path, path.with_name(PREVIOUS))
        else:
            commit(second, path.with_name(PREVIOUS))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; it may hold tensors and plain values only, never code.

    Raises:
        CheckpointError: there is none, or it is damaged.
        StorageError: it cannot be read, which says nothing about what it holds.
    """
    try:
        state, is_sealed = sealed.read(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train first, or name another trial") from None
    except sealed.DamagedError as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({error}); {REMOVE}") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check disk, rights and connection") from None
    if not isinstance(state, dict) or not {"tensors", "progress", "parents", "files", "meaning"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of a trial; name the checkpoint.pt of one")
    if not is_sealed:
        raise CheckpointError(f"{path}: damaged checkpoint (it has no checksum); {REMOVE}")
    return state


def newest(folder: Path) -> tuple[str | None, dict[str, Any], list[str]]:
    """The checkpoint that a trial goes on from. Damaged ones are set aside: a trial goes on from what is whole.

    Only for the attempt that holds the folder.

    Returns:
        The name of its file, or None where there is none; what it holds; and what there is to tell, in lines.

    Raises:
        StorageError: a checkpoint cannot be read, which says nothing about what it holds.
    """
    notes: list[str] = []
    for name in (FILE, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            state = load(folder / name)
        except CheckpointError as error:
            said = str(error).partition(";")[0]
            notes.append(f"{said}; kept for a look as {_set_aside(folder / name)}")
            continue
        if notes:
            notes.append(f"the trial goes on from {name}, which is one checkpoint older")
        return name, state, notes
    if notes:
        notes.append("no checkpoint is left: the trial starts again from its beginning")
    return None, {}, notes


def _set_aside(path: Path) -> str:
    """Rename a damaged checkpoint; no more than one is kept."""
    former = list(path.parent.glob(DAMAGED.format("*")))
    number = max((int(one.stem.rpartition("-")[2]) for one in former), default=0) + 1
    aside = DAMAGED.format(number)
    with storing(path):
        path.replace(path.with_name(aside))
        for one in former:
            one.unlink()
    return aside
