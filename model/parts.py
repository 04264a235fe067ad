"""The parts of a model, and which parameters train: `model.trainable` names parts or patterns of parameter names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from data.errors import ConfigError
from model.config import NEW_PARTS

PARTS = ("encoder", "encoder_lora", "adapter", "lora", "tokens", "llm")


def part_of(name: str) -> str:
    """Return the part of a SpeechLLM that a parameter belongs to."""
    head = name.split(".", maxsplit=1)[0]
    if head == "llm":
        return "lora" if "lora_" in name else "llm"
    if head == "encoder":
        return "encoder_lora" if ".lora_" in name else "encoder"
    return head if head in PARTS else "tokens"


def select_trainable(model: nn.Module, patterns: Sequence[str], fixed: set[str]) -> set[str]:
    """Return the names of the parameters that parts and patterns select.

    Args:
        model: a SpeechLLM.
        patterns: names of parts, or patterns of parameter names with the wildcards of a shell. A part that the model
            lacks selects nothing: a model that reads text only has no encoder.
        fixed: names of parameters that never train, such as the convolutions of an encoder.

    Raises:
        ConfigError: a pattern matches nothing, or no parameter is selected.
    """
    names = [name for name, _ in model.named_parameters() if name not in fixed]
    selected: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if part_of(name) == pattern or fnmatchcase(name, pattern)}
        if not matched and pattern not in PARTS:
            raise ConfigError(
                f"model.trainable: {pattern!r} matches no parameter that can train; use {', '.join(PARTS)}, or a "
                f"pattern of names such as {names[0]}"
            )
        selected |= matched
    if not selected:
        raise ConfigError(
            f"model.trainable: {'+'.join(patterns)} leaves nothing to train in this configuration; turn on LoRA, "
            "model.cls, or with speech the adapter or the encoder"
        )
    return selected


def check_loaded(model: nn.Module, loaded: set[str], new_parts: Sequence[str] = NEW_PARTS) -> None:
    """Refuse new parts that are neither trained nor loaded, because they would stay random.

    Args:
        model: a SpeechLLM.
        loaded: names of the parameters that were loaded from an earlier trial or a file.
        new_parts: parts that start at random; the adapter of an audio LLM is pretrained.

    Raises:
        ConfigError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if part_of(name) in new_parts and not parameter.requires_grad and name not in loaded:
            part = part_of(name)
            own = {"adapter": "model.adapter.init_from or ", "lora": "model.lora.init_from or "}
            source = f"{own.get(part, '')}model.init_from"
            without = {
                "lora": "model.lora.enabled=false",
                "tokens": "model.cls=none and model.end_of_audio=none",
                "encoder_lora": "model.encoder.lora.rank=0",
            }
            alternative = f", or leave it out with {without[part]}" if part in without else ""
            raise ConfigError(
                f"model.trainable: {part} is frozen and was never loaded, so {name} would stay random; add {part} to "
                f"model.trainable, load it with {source}{alternative}"
            )


@dataclass(frozen=True)
class PartSummary:
    """A row of the table of parts that is printed before training."""

    name: str
    parameters: int
    trained: int
    loaded: str  # where the weights come from


def summarise_parts(model: nn.Module, sources: Mapping[str, str]) -> list[PartSummary]:
    """Return the parts of a model with their numbers of parameters; tied parameters count once.

    Args:
        model: a SpeechLLM.
        sources: where the weights come from, by part.
    """
    rows = []
    for part in PARTS:
        tensors = [tensor for name, tensor in model.named_parameters() if part_of(name) == part]
        if tensors:
            total = sum(tensor.numel() for tensor in tensors)
            trained = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
            rows.append(PartSummary(part, total, trained, sources.get(part, "")))
    return rows
