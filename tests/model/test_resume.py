"""A killed run resumes bit for bit, with dropout, SpecAugment, augmented clips, several tasks and every schedule on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.config import AugmentConfig, DataConfig
from data.shards.dataset import Shards
from model.config import LearningRates, LossConfig
from tests.model.trials import CONFIG, DROPOUT, NEW, TWO, KilledError, Trial, history, kill_after, same_end

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
    "distillation": Trial(model={"lora": DROPOUT}, train=CONFIG.model_copy(update={"losses": LossConfig(hidden=0.2)})),
}


@pytest.fixture(scope="module", params=RESUMED)
def whole(
    request: pytest.FixtureRequest, models: Path, corpus: Shards, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trial, Path]:
    """A trial that nothing interrupted, and its folder."""
    trial, folder = RESUMED[request.param], tmp_path_factory.mktemp("whole")
    trial.run(models, corpus, folder)
    assert history(folder)[-1][1]["steps"] >= 8
    return trial, folder


@pytest.mark.parametrize("steps", [2, 3, 4, 7])
def test_a_killed_run_resumes_bit_for_bit(
    steps: int,
    whole: tuple[Trial, Path],
    models: Path,
    corpus: Shards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed within the first epoch before, at and after a checkpoint, and later on."""
    trial, folder = whole
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, steps)
        trial.run(models, corpus, tmp_path)
    trial.run(models, corpus, tmp_path)
    assert same_end(tmp_path, folder)


def test_a_run_that_is_killed_again_and_again_resumes_bit_for_bit(
    whole: tuple[Trial, Path], models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, folder = whole
    for _ in range(10):
        try:
            with monkeypatch.context() as patch:
                kill_after(patch, 3)
                trial.run(models, corpus, tmp_path)
        except KilledError:
            continue
        break
    assert same_end(tmp_path, folder)


def test_a_run_that_ends_while_it_reports_is_reported_again(
    whole: tuple[Trial, Path], models: Path, corpus: Shards, tmp_path: Path
) -> None:
    def stop(epoch: int, metrics: dict[str, Any]) -> None:
        raise KilledError

    trial, folder = whole
    with pytest.raises(KilledError):
        trial.run(models, corpus, tmp_path, stop)
    epochs: list[int] = []
    trial.run(models, corpus, tmp_path, lambda epoch, metrics: epochs.append(epoch))
    assert epochs == [1, 2]
    assert same_end(tmp_path, folder)


def test_the_generators_matter_to_what_is_resumed(models: Path, corpus: Shards) -> None:
    """Otherwise the tests above would hold without dropout, too."""
    trial = RESUMED["encoder-dropout-specaugment"]
    model, data = trial.start(models, corpus)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    (examples,) = data.read("train", [[0, 1, 2]])

    @torch.no_grad()
    def moves(compute: Callable[[], Tensor]) -> bool:
        one, other = compute(), compute()
        return not torch.equal(one, other)

    def heard() -> Tensor:
        return torch.cat(model.clips(examples))

    def said() -> Tensor:
        logits: Tensor = model.llm(input_ids=torch.tensor([[1, 5, 9]])).logits
        return logits

    model.train()
    assert moves(heard)
    assert moves(said)
    model.eval()
    assert not moves(heard)
    assert not moves(said)
