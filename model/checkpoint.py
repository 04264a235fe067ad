"""Checkpoints: what trains and the state of the loop, nothing that the base model's files hold already."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import StorageError, UserError, listed, storing
from model import sealed
from model.attempt import Attempt

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


@dataclass(frozen=True)
class Former:
    """What a former trial knows."""

    tensors: dict[str, Tensor]  # what it trained, over what the trials trained that it had started from
    links: list[dict[str, str]]  # "path" and "digest" of these trials, oldest first, itself last
    meaning: dict[str, str]  # see SpeechLLM.meaning
    fingerprint: str  # of its corpus


def _link(path: Path) -> dict[str, Any]:
    """What a trial's checkpoint holds, or an exported model, which stands on nobody."""
    from model import exported

    return exported.as_state(path) if exported.is_exported(path) else load(path)


def chain(source: str) -> Former:
    """Read a former trial and those that it had started from, or an exported model, which holds what they trained.

    Args:
        source: folder of the trial, its checkpoint file, or folder of the exported model.

    Raises:
        CheckpointError: a link is missing, damaged, or has changed since it was started from.
    """
    from model import exported

    path = Path(source) / FILE if Path(source).is_dir() and not exported.is_exported(source) else Path(source)
    if not path.exists():
        raise CheckpointError(f"model.init_from: {source}: no such checkpoint; train it first, or name another trial")
    try:
        state = _link(path)
        tensors: dict[str, Tensor] = {}
        for link in state["parents"]:
            parent = _link(Path(link["path"]))
            if parent["digest"] != link["digest"]:
                raise CheckpointError(
                    f"{link['path']}: has changed since {path} was started from it; put the former checkpoint back"
                )
            tensors |= parent["tensors"]
    except CheckpointError as error:
        why = str(error).replace(REMOVE, "name another trial")
        raise CheckpointError(f"model.init_from: {why}") from None
    own = {"path": str(path.absolute()), "digest": state["digest"]}
    return Former(tensors | state["tensors"], [*state["parents"], own], state["meaning"], state["fingerprint"])


def check_meaning(former: Former, here: dict[str, str], parts: set[str]) -> None:
    """Refuse loaded parts that mean something else in this model.

    Raises:
        CheckpointError: names the first one.
    """
    for part in sorted(parts & here.keys()):
        if former.meaning[part] != here[part]:
            raise CheckpointError(
                f"model.init_from: {former.links[-1]['path']} has {part} with {former.meaning[part]}, and this model "
                f"with {here[part]}; use the settings of that trial"
            )


def placed(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that this model has for them: LoRA moves the weights of an LLM into wrappers."""

    def bare(name: str) -> str:
        return name.replace("base_model.model.", "").replace(".base_layer", "")

    own = {bare(name): name for name, _ in model.named_parameters()}
    return {own.get(bare(name), name): tensor for name, tensor in tensors.items()}


def start_from(model: nn.Module, tensors: dict[str, Tensor], source: str, partial: bool) -> tuple[set[str], str]:
    """Copy a former trial's tensors into the model.

    Returns:
        The names that were matched, and the report in one line.

    Raises:
        CheckpointError: a tensor has another shape here or, unless `partial`, no place.
    """
    own = dict(model.named_parameters())
    matched = own.keys() & tensors.keys()
    unexpected = tensors.keys() - matched
    said = f"{source}: {len(matched)} of {len(tensors)} tensors matched; left out: {listed(unexpected)}"
    if not matched or (unexpected and not partial):
        raise CheckpointError(
            f"model.init_from: {said}; use the settings of that trial"
            + (", or allow it with model.init_partial=true" if matched else "")
        )
    for name in sorted(matched):
        if own[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"model.init_from: {name} is {list(tensors[name].shape)} in {source} and {list(own[name].shape)} here; "
                "use the settings of that trial"
            )
    with torch.no_grad():
        for name in matched:
            own[name].copy_(tensors[name])
    return set(matched), said


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of tensors by name: equal digests mean equal bits."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def save(path: Path, state: dict[str, Any], attempt: Attempt | None = None) -> None:
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
    own = attempt or Attempt.claim(path.parent)
    own.check()
    unfinished = own.unfinished(path.name)
    with storing(path):
        try:
            sealed.write(unfinished, state)
            with own.writing():
                _keep(path, own)
                unfinished.replace(path)
                sealed.sync_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def _keep(path: Path, attempt: Attempt) -> None:
    """Name a checkpoint PREVIOUS, by a second name where the file system has such, so that it keeps its own."""
    if not path.exists():
        return
    second = attempt.unfinished(PREVIOUS)
    try:
        second.hardlink_to(path)
    except OSError:
        path.replace(path.with_name(PREVIOUS))
        return
    second.replace(path.with_name(PREVIOUS))
    second.unlink(missing_ok=True)  # where both named one file already, the move has left both names


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
