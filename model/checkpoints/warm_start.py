"""Start the weights of a trial from the checkpoint of an earlier trial, from an exported model or a PEFT adapter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.errors import ConfigError, listed
from model.checkpoints import peft_export
from model.checkpoints.audio_llms import plain_llm_name
from model.checkpoints.base_files import check_adapter
from model.checkpoints.checkpoint import (
    FILE,
    REMOVE,
    CheckpointError,
    CheckpointMisfitError,
    CheckpointState,
    ParentLink,
    load_result,
)
from model.checkpoints.fingerprint import BaseIdentity, Bases, refuse_other_bases
from model.compat import lora_parameter_names
from model.config import LoraSettings
from model.parts import part_of

# The base models without which tensors of a part have no meaning.
BASES_OF_PARTS = {
    "lora": ("model.llm.path",),
    "llm": ("model.llm.path",),
    "tokens": ("model.llm.path",),
    "adapter": ("model.encoder.path", "model.llm.path"),
    "encoder": ("model.encoder.path",),
    "encoder_lora": ("model.encoder.path",),
}


@dataclass(frozen=True)
class ParentCheckpoint:
    """What a new trial starts from."""

    tensors: dict[str, Tensor]  # what the earlier trial and its own parents trained
    lineage: list[ParentLink]  # these trials, oldest first, the earlier trial last
    meaning: dict[str, str]  # see `SpeechLLM.meaning`
    fingerprint: str  # of the earlier trial's corpus
    bases: dict[str, BaseIdentity]  # the base models of the earlier trial, by setting


def load_parent(source: str) -> ParentCheckpoint:
    """Read an earlier trial and those that it started from, or an exported model, which contains what they trained.

    Args:
        source: folder of the trial, its checkpoint file, or folder of the exported model.

    Raises:
        CheckpointError: a checkpoint of the lineage is missing, damaged, or has changed since it was started from.
    """
    is_trial = Path(source).is_dir() and not peft_export.is_exported(source)
    path = Path(source) / FILE if is_trial else Path(source)
    if not path.exists():
        raise CheckpointError(f"model.init_from: {source}: no such checkpoint; train it first, or name another trial")
    try:
        state = _load(path)
        tensors: dict[str, Tensor] = {}
        for link in state["parents"]:
            parent = _load(Path(link["path"]))
            if parent["digest"] != link["digest"]:
                raise CheckpointError(
                    f"{link['path']}: has changed since {path} was started from it; put the former checkpoint back"
                )
            tensors |= parent["tensors"]
    except CheckpointError as error:
        message = str(error).replace(REMOVE, "name another trial")
        raise CheckpointError(f"model.init_from: {message}") from None
    link = ParentLink(path=str(path.absolute()), digest=state["digest"])
    return ParentCheckpoint(
        tensors | state["tensors"],
        [*state["parents"], link],
        state["meaning"],
        state["fingerprint"],
        {setting: BaseIdentity.model_validate(base) for setting, base in state.get("bases", {}).items()},
    )


def _load(path: Path) -> CheckpointState | peft_export.ExportedState:
    return peft_export.load_state(path) if peft_export.is_exported(path) else load_result(path)


def check_meaning(parent: ParentCheckpoint, meaning: dict[str, str], parts: set[str]) -> None:
    """Refuse loaded parts whose tensors would have another meaning in this model.

    Args:
        parent: that they were loaded from.
        meaning: of the parts of this model.
        parts: that were loaded.

    Raises:
        CheckpointError: names the first one.
    """
    for part in sorted(parts & meaning.keys()):
        if parent.meaning[part] != meaning[part]:
            raise CheckpointMisfitError(
                f"model.init_from: {parent.lineage[-1]['path']} has {part} with {parent.meaning[part]}, and this model "
                f"with {meaning[part]}; use the settings of that trial"
            )


def check_parent_bases(parent: ParentCheckpoint, bases: Bases, parts: set[str]) -> None:
    """Refuse tensors that were trained on other weights under the path of a base model of this trial.

    Another path is accepted: then it is the configuration that says so.

    Args:
        parent: that the tensors were loaded from.
        bases: of this trial, by setting.
        parts: that were loaded.

    Raises:
        OtherBaseError: names the base model.
    """
    needed = {setting for part in parts for setting in BASES_OF_PARTS[part]}
    if "model.encoder.path" not in bases:  # an audio LLM has the encoder
        needed.add("model.llm.path")
    then = {
        setting: base
        for setting, base in parent.bases.items()
        if setting in needed & bases.keys() and base.path == bases[setting].path
    }
    refuse_other_bases(f"model.init_from: {parent.lineage[-1]['path']}", then, bases)


def match_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that they have in this model: LoRA moves the weights of an LLM into wrappers."""

    def plain(name: str) -> str:
        name = plain_llm_name(name.replace("base_model.model.", ""))
        # LoRA layers of fused experts are nested: there, the wrapper tells one from the other.
        return name if ".lora_" in name else name.replace(".base_layer", "")

    names = {plain(name): name for name, _ in model.named_parameters()}
    return {names.get(plain(name), name): tensor for name, tensor in tensors.items()}


def load_parent_tensors(
    model: nn.Module, tensors: dict[str, Tensor], source: str, partial: bool
) -> tuple[set[str], str]:
    """Copy the tensors of an earlier trial into the model.

    Returns:
        The names that were matched, and a report in one line.

    Raises:
        CheckpointError: a tensor has another shape in the model or, unless `partial`, is not in it.
    """
    parameters = dict(model.named_parameters())
    matched = parameters.keys() & tensors.keys()
    unexpected = tensors.keys() - matched
    report = f"{source}: {len(matched)} of {len(tensors)} tensors matched; left out: {listed(unexpected)}"
    if not matched or (unexpected and not partial):
        raise CheckpointMisfitError(
            f"model.init_from: {report}; use the settings of that trial"
            + (", or allow it with model.init_partial=true" if matched else "")
        )
    for name in sorted(matched):
        if parameters[name].shape != tensors[name].shape:
            raise CheckpointMisfitError(
                f"model.init_from: {name} is {list(tensors[name].shape)} in {source} and "
                f"{list(parameters[name].shape)} here; use the settings of that trial"
            )
    with torch.no_grad():
        for name in matched:
            parameters[name].copy_(tensors[name])
    return set(matched), report


def load_lora(model: nn.Module, lora: LoraSettings, folder: str) -> Mapping[str, Tensor]:
    """Copy the tensors of a PEFT adapter into the LoRA layers of a model.

    Args:
        model: a SpeechLLM with LoRA.
        lora: its settings.
        folder: of the adapter, as `PeftModel.save_pretrained` and `sweep export` write it.

    Returns:
        All parameters of LoRA, by name.

    Raises:
        ConfigError: see `check_adapter`; or the adapter adapts other layers than the model has.
    """
    path = check_adapter(lora, folder)
    if path.suffix == ".safetensors":
        stored = load_file(path)
    else:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    named = {f"llm.{name}": tensor for name, tensor in lora_parameter_names(stored).items()}
    tensors = match_names(model, named)
    parameters = {name: tensor for name, tensor in model.named_parameters() if part_of(name) == "lora"}
    there, here = _layer_names(tensors), _layer_names(parameters)
    if there != here:
        raise ConfigError(
            f"model.lora.init_from: {folder}: adapts {', '.join(there)}, and model.lora.targets adapts "
            f"{', '.join(here)}; use --set 'model.lora.targets=[{', '.join(there)}]'"
        )
    different = sorted(tensors.keys() ^ parameters.keys()) or sorted(
        name for name, tensor in parameters.items() if tensor.shape != tensors[name].shape
    )
    if different:
        raise ConfigError(
            f"model.lora.init_from: {folder}: was trained on another LLM: {different[0].removeprefix('llm.')} differs; "
            "set model.llm.path to that one"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return parameters


def _layer_names(names: Iterable[str]) -> list[str]:
    """Return the names of the layers that LoRA adapts, such as q_proj, from those of its tensors."""
    return sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names})
