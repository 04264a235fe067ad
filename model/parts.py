"""The parts of a model, and which of their parameters train: one setting of names and patterns decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from data.errors import ConfigError
from model.config import NEW_PARTS

PARTS = ("encoder", "adapter", "lora", "tokens", "llm")


def part_of(name: str) -> str:
    """The part that a parameter of a SpeechLLM belongs to."""
    head = name.split(".", maxsplit=1)[0]
    if head == "llm":
        return "lora" if "lora_" in name else "llm"
    return head if head in PARTS else "tokens"


def trained_names(model: nn.Module, patterns: Sequence[str], fixed: set[str]) -> set[str]:
    """Names of the parameters that parts and patterns select.

    Args:
        model: a SpeechLLM.
        patterns: names of parts, or patterns as of a shell. A part that this model lacks selects nothing: a model that
            reads text only has no encoder.
        fixed: parameters that never train: an encoder's convolutions.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters() if name not in fixed]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if part_of(name) == pattern or fnmatchcase(name, pattern)}
        if not matched and pattern not in PARTS:
            raise ConfigError(
                f"model.trainable: {pattern!r} matches no parameter that can train; use {', '.join(PARTS)}, or a "
                f"pattern of names such as {names[0]}"
            )
        found |= matched
    if not found:
        raise ConfigError(
            f"model.trainable: {'+'.join(patterns)} leaves nothing to train in this configuration; turn on LoRA, "
            "model.cls, or with speech the adapter or the encoder"
        )
    return found


def check_loaded(model: nn.Module, loaded: set[str]) -> None:
    """Refuse parts that are neither trained nor loaded: they would stay random for ever.

    Raises:
        ConfigError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if part_of(name) in NEW_PARTS and not parameter.requires_grad and name not in loaded:
            part = part_of(name)
            source = "model.adapter.init_from or model.init_from" if part == "adapter" else "model.init_from"
            without = {"lora": "model.lora.enabled=false", "tokens": "model.cls=none and model.end_of_audio=none"}
            other = f", or leave it out with {without[part]}" if part in without else ""
            raise ConfigError(
                f"model.trainable: {part} is frozen and was never loaded, so {name} would stay random; add {part} to "
                f"model.trainable, load it with {source}{other}"
            )


@dataclass(frozen=True)
class Part:
    """A row of the table that is shown before training."""

    name: str
    parameters: int
    trained: int
    loaded: str  # where its weights come from


def parts(model: Any) -> list[Part]:
    """Parts with their parameter counts; tied parameters count once."""
    rows = []
    for part in PARTS:
        own = [(name, tensor) for name, tensor in model.named_parameters() if part_of(name) == part]
        if own:
            trained = sum(tensor.numel() for _, tensor in own if tensor.requires_grad)
            rows.append(Part(part, sum(tensor.numel() for _, tensor in own), trained, model.sources.get(part, "")))
    return rows
