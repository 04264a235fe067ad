"""Models for the tests of this folder."""

from pathlib import Path
from typing import Any

import torch

from model.checkpoint import seed_everything
from model.config import ModelConfig
from model.speech_llm import SpeechLLM
from tests.conftest import LABELS


def settings(models: Path, kind: str = "hubert-layer", **changed: Any) -> ModelConfig:
    tree: dict[str, Any] = {
        "modality": "text+speech",
        "encoder": {"path": str(models / kind), "trainable": True},
        "adapter": {"pool": 8, "stride": 4},
        "llm": {"path": str(models / "llm")},
        "lora": {"rank": 4, "dropout": 0.0},
        "end_of_audio": "learned",
        "cls": "before",
    }
    return ModelConfig.model_validate(tree | changed)


def build(models: Path, kind: str = "hubert-layer", seed: int = 0, **changed: Any) -> SpeechLLM:
    """A model whose LoRA update is not the zero it starts as, so that it takes part in the test."""
    seed_everything(seed)
    model = SpeechLLM(settings(models, kind, **changed), LABELS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal relative to the largest magnitude."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
