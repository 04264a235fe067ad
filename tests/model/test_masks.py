"""SpecAugment in training: masks are drawn by seed, epoch and utterance, whatever the batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.loading.examples import Example
from data.shards.dataset import Shards
from model.config import TrainConfig
from model.speech_llm.speech_llm import SpeechLLM
from model.training.trainer import fit
from tests.model.common import build, close
from tests.model.trials import ONE, Trial


@pytest.fixture
def calm(models: Path, tmp_path: Path) -> Path:
    """A HuBERT without dropout, so that its masks are all that is drawn."""
    shutil.copytree(models / "hubert-layer", tmp_path / "calm")
    path = tmp_path / "calm" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: 0.0 if "dropout" in name else value for name, value in config.items()}))
    return tmp_path / "calm"


def augmented(models: Path, folder: Path, share: float = 0.3) -> SpeechLLM:
    model = build(models, encoder={"path": str(folder), "spec_augment": share}, modality="speech")
    model.augment = (7, 2)
    return model.train()


@torch.no_grad()
def test_masks_do_not_depend_on_the_batch(models: Path, calm: Path, examples: list[Example]) -> None:
    """Nor do the embeddings of masked clips."""
    model = augmented(models, calm)
    together = model.clips(examples)
    for place, example in enumerate(examples):
        assert close(model.clips([example])[0], together[place])
    for one, other in zip(model.clips(examples[::-1]), together[::-1], strict=True):
        assert close(one, other)


@torch.no_grad()
def test_masks_follow_from_seed_epoch_and_utterance(models: Path, calm: Path, examples: list[Example]) -> None:
    model = augmented(models, calm)
    long = examples[-1]

    def masks(seed: int, epoch: int, example: Example = long) -> list[bool]:
        model.augment = (seed, epoch)
        return model._time_masks([example], [np.zeros(len(long.pcm), np.float32)])[0].tolist()

    assert masks(7, 2) == masks(7, 2)
    assert 0 < sum(masks(7, 2)) < len(masks(7, 2))
    others = [masks(8, 2), masks(7, 3), masks(7, 2, examples[0])]
    assert all(other != masks(7, 2) for other in others)


@torch.no_grad()
def test_frames_are_masked_in_training_only(models: Path, calm: Path, examples: list[Example]) -> None:
    def clips(model: SpeechLLM) -> Tensor:
        return torch.cat(model.clips(examples))

    plain = clips(augmented(models, calm, share=0.0))
    masked = augmented(models, calm)
    assert not close(clips(masked), plain, 1e-2)
    assert close(clips(masked.eval()), plain)


def test_every_epoch_has_masks_of_its_own(models: Path, corpus: Shards, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    trial = Trial(train=TrainConfig(epochs=3, batch_size=64))
    model, data = trial.start(models, corpus)
    fit(model, data, trial.train, ONE, 7, tmp_path, lambda epoch, metrics: seen.append(model.augment))
    assert seen == [(7, 0), (7, 1), (7, 2)]
