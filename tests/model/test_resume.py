"""A killed run resumes bit for bit, with dropout, SpecAugment, augmented clips, several tasks and every schedule on."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.config import AugmentConfig, DataConfig
from data.shards.dataset import Shards
from model.config import LearningRates, LossConfig
from model.evaluation.metrics import summarise
from tests.model.trials import CONFIG, DROPOUT, NEW, TWO, KilledError, Trial, history, kill_after, same_end

NO_TOKENS = {"end_of_audio": "none", "cls": "none"}
RESUMED = {
    "lora-dropout": Trial(model={"lora": DROPOUT}),
    "encoder-dropout-specaugment": Trial(
        "hubert-group",
        {"trainable": f"encoder+{NEW}", "encoder": {"dropout": 0.1, "spec_augment": 0.3}, "lora": DROPOUT},
    ),
    "two-tasks-cosine": Trial(
        model={"lora": DROPOUT},
        tasks=TWO,
        train=CONFIG.model_copy(
            update={"schedule": "cosine", "learning_rates": LearningRates(adapter=1e-3), "batch_size": 9}
        ),
    ),
    "balanced-augmented": Trial(
        model={"lora": DROPOUT},
        train=CONFIG.model_copy(update={"sampling": "balanced"}),
        data=DataConfig(history=2, augment=AugmentConfig(speeds=(0.9, 1.0, 1.1), noise_db=(5.0, 20.0))),
    ),
    "audio-llm": Trial(
        "granite-speech", {"trainable": "encoder.*.layers.1.*+adapter+lora", "lora": DROPOUT} | NO_TOKENS
    ),
    "distillation": Trial(model={"lora": DROPOUT}, train=CONFIG.model_copy(update={"losses": LossConfig(hidden=0.2)})),
}

LONG = ("audio-llm", "distillation")  # left to the `long` tests


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in RESUMED]
)
def whole(
    request: pytest.FixtureRequest, models: Path, corpus: Shards, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trial, Path]:
    """A trial that nothing interrupted, and its folder."""
    trial, folder = RESUMED[request.param], tmp_path_factory.mktemp("whole")
    trial.run(models, corpus, folder)
    assert history(folder)[-1][1]["steps"] >= 8
    return trial, folder


ONE_BY_ONE = [pytest.param((steps,), marks=pytest.mark.long) for steps in (2, 3, 4, 7)]


@pytest.mark.parametrize("kills", [(2, 3, 1, 3), *ONE_BY_ONE, pytest.param((3,) * 9, marks=pytest.mark.long)])
def test_a_killed_run_resumes_bit_for_bit(
    kills: tuple[int, ...],
    whole: tuple[Trial, Path],
    models: Path,
    corpus: Shards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before, at and after a checkpoint, and in a later epoch; and once more while it reports an epoch."""
    trial, folder = whole

    def stop(epoch: int, metrics: dict[str, Any]) -> None:
        raise KilledError

    for steps in kills:
        try:
            with monkeypatch.context() as patch:
                kill_after(patch, steps)
                trial.run(models, corpus, tmp_path)
        except KilledError:
            pass
    with pytest.raises(KilledError):
        trial.run(models, corpus, tmp_path, stop)
    epochs: list[int] = []
    trial.run(models, corpus, tmp_path, lambda epoch, metrics: epochs.append(epoch))
    assert epochs == [1, 2]
    assert same_end(tmp_path, folder)


def test_what_validation_draws_changes_nothing(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages draw random numbers when they are imported, which the first validation of a process does."""
    folders, trial = (tmp_path / "draws", tmp_path / "plain"), RESUMED["lora-dropout"]

    def draw(*args: object) -> dict[str, float]:
        random.random(), np.random.rand(), torch.rand(())
        return summarise(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("model.training.trainer.summarise", draw)
        trial.run(models, corpus, folders[0])
    trial.run(models, corpus, folders[1])
    assert same_end(*folders)


def test_random_states_matter_to_what_is_resumed(models: Path, corpus: Shards) -> None:
    """Otherwise the test above would hold without dropout, too."""
    model, data = RESUMED["encoder-dropout-specaugment"].start(models, corpus)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    (examples,) = data.read("train", [[0, 1, 2]])

    @torch.no_grad()
    def is_random(compute: Callable[[], Tensor]) -> bool:
        return not torch.equal(compute(), compute())

    def clips() -> Tensor:
        return torch.cat(model.clips(examples))

    def logits() -> Tensor:
        return model.llm(input_ids=torch.tensor([[1, 5, 9]])).logits

    for training in (True, False):
        model.train(training)
        assert [is_random(clips), is_random(logits)] == [training, training]
