"""Checkpoints: the tensors that train and the state of the loop, nothing that the base models' files contain."""

from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from data.atomic import commit, removed_afterwards
from data.errors import StorageError, UserError, storing
from model.checkpoints import checksum
from model.checkpoints.fencing import TrialLock
from model.checkpoints.fingerprint import BaseIdentity, refuse_other_bases

FILE, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged-{}.pt"
REMOVE = "remove it to start this trial again"


class CheckpointError(UserError):
    """A checkpoint cannot be read, or has changed since it was started from; another copy of it may be put there."""

    outside = True


class CheckpointMisfitError(CheckpointError):
    """A checkpoint cannot be used with this configuration."""

    outside = False


class ParentLink(TypedDict):
    """A trial or an exported model that a trial started from."""

    path: str
    digest: str  # of its tensors


class KeptWeights(TypedDict):
    """The weights of the best epoch so far, with `train.keep: best`."""

    epoch: int
    tensors: dict[str, Tensor]
    digest: str  # of the tensors


class CheckpointState(TypedDict):
    """The content of a checkpoint."""

    tensors: dict[str, Tensor]  # all parameters that train
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    generators: list[Any]  # random states, by worker
    progress: dict[str, Any]  # see `Progress`
    plan_hash: str  # of the batch plan
    fingerprint: str  # of the corpus
    digest: str  # of the tensors
    parents: list[ParentLink]  # the lineage of the trial, oldest first
    files: dict[str, str]  # digests of other files that the model was loaded from, by setting
    bases: NotRequired[dict[str, dict[str, str | None]]]  # the base models, see `bases_of`; earlier versions had none
    meaning: dict[str, str]  # see `SpeechLLM.meaning`
    attempt: int
    kept: NotRequired[KeptWeights | None]  # earlier versions had none


class NewestCheckpoint(NamedTuple):
    """The checkpoint that a trial continues from."""

    name: str  # of its file
    state: CheckpointState


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that differ from the base model's: all parameters that train."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy trained tensors into the model.

    Raises:
        CheckpointError: their names or shapes are not exactly those that train in this model.
    """
    targets = trained_tensors(model)
    different = sorted(targets.keys() ^ tensors.keys()) or sorted(
        name for name, tensor in targets.items() if tensor.shape != tensors[name].shape
    )
    if different:
        raise CheckpointMisfitError(f"the checkpoint belongs to another configuration: {different[0]} differs")
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(tensors[name])


def bases_of(state: CheckpointState) -> dict[str, BaseIdentity]:
    """Return the base models that a trial was trained on, by setting; those that the checkpoint does not name lack."""
    return {setting: BaseIdentity.model_validate(base) for setting, base in state.get("bases", {}).items()}


def restore(model: Any, state: CheckpointState, name: str = "the checkpoint") -> None:
    """Copy a trial's tensors into its model, which must have the same base models and have started from the same
    parents.

    Args:
        model: a SpeechLLM.
        state: the checkpoint of the trial.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: see `load_tensors`; or a parent has changed since.
        OtherBaseError: a base model has changed since, and the model does not allow that.
    """
    if not model.allow_other_base:
        refuse_other_bases(name, bases_of(state), model.bases)
    if len(model.parents) != len(state["parents"]):
        raise CheckpointMisfitError(
            f"the checkpoint belongs to another configuration: it started from {len(state['parents'])} earlier trials, "
            f"and model.init_from gives {len(model.parents)}"
        )
    for now, then in zip(model.parents, state["parents"], strict=True):
        if now["digest"] != then["digest"]:
            raise CheckpointError(
                f"{now['path']}: has changed since this trial was started from it; put the former checkpoint back"
            )
    for setting, digest_now in model.files.items():
        if state["files"].get(setting) != digest_now:
            raise CheckpointError(
                f"{setting}: its file has changed since this trial was started; put the former one back"
            )
    load_tensors(model, state["tensors"])


def save(path: Path, state: CheckpointState, lock: TrialLock | None = None) -> None:
    """Write a checkpoint under a temporary name, flush it, and rename it; the former one is kept as PREVIOUS.

    A kill between any two steps leaves one of the two complete under its name, and no name ever holds half a file.

    Args:
        path: of the checkpoint.
        state: its content.
        lock: of the attempt that writes it; by default a new attempt is claimed.

    Raises:
        StaleAttemptError: a later attempt has begun; nothing was changed.
        StorageError: the disk is full or cannot be written; the former checkpoints are unchanged.
    """
    lock = lock or TrialLock.claim(path.parent)
    lock.check()
    with storing(path), removed_afterwards(lock.unfinished(path.name)) as unfinished:
        checksum.write(unfinished, state)
        with lock.writing():
            _keep_as_previous(path, lock)
            commit(unfinished, path, durable=True)


def _keep_as_previous(path: Path, lock: TrialLock) -> None:
    """Rename a checkpoint to PREVIOUS. With hard links, it keeps its own name as well until it is replaced."""
    if not path.exists():
        return
    with removed_afterwards(lock.unfinished(PREVIOUS)) as link:  # a rename onto the same file leaves both names
        try:
            link.hardlink_to(path)
        except OSError:
            commit(path, path.with_name(PREVIOUS))
        else:
            commit(link, path.with_name(PREVIOUS))


def load(path: Path) -> CheckpointState:
    """Read a checkpoint: tensors and plain values, never code.

    Raises:
        CheckpointError: there is none, or it is damaged.
        StorageError: it cannot be read, which says nothing about its content.
    """
    try:
        state, has_checksum = checksum.read(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train first, or name another trial") from None
    except checksum.DamagedError as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({error}); {REMOVE}") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check disk, rights and connection") from None
    if not isinstance(state, dict) or not {"tensors", "progress", "parents", "files", "meaning"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of a trial; name the checkpoint.pt of one")
    if not has_checksum:
        raise CheckpointError(f"{path}: damaged checkpoint (it has no checksum); {REMOVE}")
    return cast(CheckpointState, state)


def load_result(path: Path) -> CheckpointState:
    """Read a checkpoint for use, not to train on: `tensors` are those of the best epoch if the trial keeps them.

    Raises:
        CheckpointError, StorageError: as `load`.
    """
    return with_result(load(path))


def with_result(state: CheckpointState) -> CheckpointState:
    """Return a checkpoint whose `tensors` are those of the best epoch if the trial keeps them."""
    if kept := state.get("kept"):
        state |= {"tensors": kept["tensors"], "digest": kept["digest"]}
    return state


def result_epoch(state: CheckpointState) -> int:
    """Return the epoch whose weights `load_result` returns; 0: the first one is not complete."""
    kept = state.get("kept")
    return kept["epoch"] if kept else int(state["progress"]["epoch"])


def newest(folder: Path) -> tuple[NewestCheckpoint | None, list[str]]:
    """Return the newest intact checkpoint of a trial, if there is one. Damaged ones are renamed and skipped.

    Call it only from the attempt that holds the folder.

    Returns:
        The checkpoint, and warnings about damaged ones, in lines.

    Raises:
        StorageError: a checkpoint cannot be read, which says nothing about its content.
    """
    warnings: list[str] = []
    for name in (FILE, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            state = load(folder / name)
        except CheckpointError as error:
            problem = str(error).partition(";")[0]
            warnings.append(f"{problem}; kept for inspection as {_set_aside(folder / name)}")
            continue
        if warnings:
            warnings.append(f"the trial continues from {name}, which is one checkpoint older")
        return NewestCheckpoint(name, state), warnings
    if warnings:
        warnings.append("no checkpoint is left: the trial starts again from its beginning")
    return None, warnings


def _set_aside(path: Path) -> str:
    """Rename a damaged checkpoint and return its new name; only the last damaged one is kept."""
    former = list(path.parent.glob(DAMAGED.format("*")))
    number = max((int(damaged.stem.rpartition("-")[2]) for damaged in former), default=0) + 1
    aside = DAMAGED.format(number)
    with storing(path):
        path.replace(path.with_name(aside))
        for damaged in former:
            damaged.unlink()
    return aside
