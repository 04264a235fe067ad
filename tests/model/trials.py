"""Trials for the tests of training, and comparisons of their ends."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.config import DataConfig, TaskWeights
from data.loading.tasks import answer_sets
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.config import ModelConfig, TrainConfig
from model.evaluation.split_data import TrialData
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from model.training.trainer import Trainer, fit
from tests.model.common import bases, settings

CONFIG = TrainConfig(epochs=2, batch_size=5, learning_rate=3e-3, checkpoint_steps=3)
DATA = DataConfig(history=2)
NEW = "adapter+lora+tokens"
ONE, TWO = TaskWeights(), TaskWeights(classify=1.0, response=0.5)
DROPOUT = {"rank": 4, "dropout": 0.2}


class KilledError(Exception):
    pass


@dataclass(frozen=True)
class Trial:
    """What a test trains."""

    kind: str = "whisper"
    model: dict[str, Any] = field(default_factory=dict)
    tasks: TaskWeights = ONE
    train: TrainConfig = CONFIG
    data: DataConfig = DATA
    seed: int = 7

    def config(self, models: Path) -> ModelConfig:
        changed = {"trainable": NEW} | self.model
        encoder = bases(models, self.kind)["encoder"] | changed.get("encoder", {})
        return settings(models, self.kind, **changed | {"encoder": encoder})

    def start(self, models: Path, shards: Shards) -> tuple[SpeechLLM, TrialData]:
        seed_everything(self.seed)
        model = SpeechLLM(self.config(models), answer_sets(shards, self.tasks.active()))
        votes = self.train.labels == "votes"
        return model, TrialData.open(shards, model, self.data, ("train", "val"), votes=votes)

    def trainer(self, models: Path, shards: Shards, folder: Path) -> Trainer:
        return Trainer(*self.start(models, shards), self.train, self.tasks, self.seed, folder)

    def run(self, models: Path, shards: Shards, folder: Path, report: Callable[..., None] | None = None) -> SpeechLLM:
        model, data = self.start(models, shards)
        fit(model, data, self.train, self.tasks, self.seed, folder, report or (lambda epoch, metrics: None))
        return model


def history(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return what was reported, without the times."""
    state = checkpoint.load(folder / "checkpoint.pt")
    return [(epoch, {**metrics, "seconds": 0, "data_wait": 0}) for epoch, metrics in state["progress"]["history"]]


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Raise KilledError before a further step."""
    taken = 0
    original = Trainer.optimizer_step

    def step(self: Trainer, *args: Any) -> None:
        nonlocal taken
        if taken == steps:
            raise KilledError
        taken += 1
        original(self, *args)

    monkeypatch.setattr(Trainer, "optimizer_step", step)


def same_end(first: Path, second: Path) -> bool:
    """Compare weights, optimizer, schedule, random states and reports; not the times, nor the attempt."""
    states = [checkpoint.load(folder / "checkpoint.pt") for folder in (first, second)]
    for state in states:
        state["progress"] = {**state["progress"], "seconds": 0, "data_wait": 0, "history": 0, "times": 0}
        del state["attempt"]
    return equal(*states) and history(first) == history(second)


def equal(first: Any, second: Any) -> bool:
    """Compare to the bit, whatever contains the tensors."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)
