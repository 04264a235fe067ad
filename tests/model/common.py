"""Models for the tests of this folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from data.loading.examples import Example
from data.loading.tasks import AnswerSet
from model.config import ModelConfig
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from tests.conftest import LABELS

ANSWERS = {
    "classify": AnswerSet(LABELS, (5, 3, 2)),
    "response": AnswerSet(),
    "forecast": AnswerSet(LABELS, (5, 3, 2)),
}


def settings(models: Path, kind: str = "hubert-layer", **changed: Any) -> ModelConfig:
    tree: dict[str, Any] = {
        "modality": "text+speech",
        "trainable": "encoder+adapter+lora+tokens",
        "encoder": {"path": str(models / kind)},
        "llm": {"path": str(models / "llm")},
        "lora": {"rank": 4, "dropout": 0.0},
        "end_of_audio": "learned",
        "cls": "before",
        "max_new_tokens": 6,
    }
    return ModelConfig.model_validate(tree | changed)


def build(models: Path, kind: str = "hubert-layer", seed: int = 0, **changed: Any) -> SpeechLLM:
    """Return a model for three tasks, in evaluation mode."""
    seed_everything(seed)
    return perturb_lora(SpeechLLM(settings(models, kind, **changed), ANSWERS)).eval()


@torch.no_grad()
def perturb_lora(model: SpeechLLM) -> SpeechLLM:
    """Draw the LoRA update, which starts as zero and would take no part in a test."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    return model


def replies(examples: list[Example]) -> list[Example]:
    """The same dialogues, to be answered with texts of different lengths."""
    words = "well then tell me what you think about it now".split()
    return [
        replace(example, task="response", speaker="therapist", answer=" ".join(words[: 1 + int(example.id[2:])]))
        for example in examples
    ]


def as_two_workers(work: Callable[..., None], *args: object) -> None:
    """Run a function as rank 0 and as rank 1, in processes forked from this one, which has imported the models."""
    multiprocessing.start_processes(work, args, nprocs=2, start_method="fork")


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal relative to the largest magnitude."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
