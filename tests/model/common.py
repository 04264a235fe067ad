"""Models for the tests of this folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from data.corpus import synthetic
from data.corpus.schema import Turn
from data.loading.examples import Example
from data.loading.tasks import AnswerSet
from data.preparation.build import prepare
from data.shards.dataset import Shards
from model.config import ModelConfig
from model.objectives.losses import Share, SoftTarget
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from tests.conftest import LABELS
from tests.tiny_models import AUDIO_LLMS

ANSWERS = {
    "classify": AnswerSet(LABELS, (5, 3, 2)),
    "response": AnswerSet(),
    "forecast": AnswerSet(LABELS, (5, 3, 2)),
}


def bases(models: Path, kind: str) -> dict[str, dict[str, Any]]:
    """Return the settings that name a kind of encoder and the LLM, or an audio LLM."""
    own = kind in AUDIO_LLMS
    encoder, llm = (None, kind) if own else (str(models / kind), "llm")
    return {"encoder": {"path": encoder}, "llm": {"path": str(models / llm)}}


def settings(models: Path, kind: str = "hubert-layer", **changed: Any) -> ModelConfig:
    tree: dict[str, Any] = {
        "modality": "text+speech",
        "trainable": "encoder+adapter+lora+tokens",
        **bases(models, kind),
        "lora": {"rank": 4, "dropout": 0.0},
        "end_of_audio": "learned",
        "cls": "before",
        "max_new_tokens": 6,
    }
    parts = {name: tree[name] | changed.get(name, {}) for name in ("encoder", "llm")}
    return ModelConfig.model_validate(tree | changed | parts)


def build(models: Path, kind: str = "hubert-layer", seed: int = 0, **changed: Any) -> SpeechLLM:
    """Return a model for three tasks, in evaluation mode."""
    seed_everything(seed)
    return perturb_lora(SpeechLLM(settings(models, kind, **changed), ANSWERS)).eval()


@torch.no_grad()
def perturb_lora(model: SpeechLLM) -> SpeechLLM:
    """Draw the LoRA update and the weights of layers, which start as zero and would take no part in a test."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "layer_weights" in name:
            parameter.normal_(std=0.1 if "lora_B" in name else 1.0)
    return model


def soft_targets(examples: list[Example]) -> list[SoftTarget | None]:
    """Return a soft target for two of three examples; a share of 0 for the answer, and other shares by class weight."""
    shares = ({"change": 0.7, "neutral": 0.3}, None, {"sustain": 0.5, "change": 0.25, "neutral": 0.25})
    weights = {"change": 2.0, "sustain": 0.5, "neutral": 1.0}
    targets: list[SoftTarget | None] = []
    for index in range(len(examples)):
        chosen = shares[index % 3]
        total = sum(share * weights[label] for label, share in (chosen or {}).items())
        soft = {label: Share(share, share * weights[label] / total) for label, share in (chosen or {}).items()}
        targets.append(soft or None)
    return targets


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


def voted(folder: Path, vote: Callable[[int, Turn], dict[str, int]]) -> Shards:
    """The dialogues of the fixture `corpus`, with votes for each turn that has a label."""
    made = synthetic.corpus(sessions=9, turns=8, seed=3)
    coded = [turn for conversation in made.conversations for turn in conversation.turns if turn.label]
    for number, turn in enumerate(coded):
        turn.votes = vote(number, turn)
    return prepare(made, folder)
