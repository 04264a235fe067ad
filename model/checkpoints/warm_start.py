"""Start the weights of a trial from a checkpoint of an earlier one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import listed
from model.checkpoints.checkpoint import FILE, REMOVE, CheckpointError, load


@dataclass(frozen=True)
class ParentCheckpoint:
    """What a former trial knows."""

    tensors: dict[str, Tensor]  # what it trained, over what the trials trained that it had started from
    links: list[dict[str, str]]  # "path" and "digest" of these trials, oldest first, itself last
    meaning: dict[str, str]  # see SpeechLLM.meaning
    fingerprint: str  # of its corpus


def _link(path: Path) -> dict[str, Any]:
    """What a trial's checkpoint holds, or an exported model, which stands on nobody."""
    from model.checkpoints import peft_export as exported

    return exported.as_state(path) if exported.is_exported(path) else load(path)


def chain(source: str) -> ParentCheckpoint:
    """Read a former trial and those that it had started from, or an exported model, which holds what they trained.

    Args:
        source: folder of the trial, its checkpoint file, or folder of the exported model.

    Raises:
        CheckpointError: a link is missing, damaged, or has changed since it was started from.
    """
    from model.checkpoints import peft_export as exported

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
    return ParentCheckpoint(
        tensors | state["tensors"], [*state["parents"], own], state["meaning"], state["fingerprint"]
    )


def check_meaning(former: ParentCheckpoint, here: dict[str, str], parts: set[str]) -> None:
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
