"""SpecAugment in training: masks depend on seed, epoch and utterance, and not on the batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loading.examples import Example
from data.shards.dataset import Shards
from model.config import TrainConfig
from model.encoders.spec_augment import draw_time_mask
from model.speech_llm.speech_llm import SpeechLLM
from model.training.trainer import fit
from tests.model.common import build, close
from tests.model.trials import ONE, Trial


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A HuBERT without dropout, so that only masks are drawn."""
    path = Path(shutil.copytree(models / "hubert-layer", tmp_path / "hubert")) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: 0.0 if "dropout" in name else value for name, value in config.items()}))
    return path.parent


def augmented(models: Path, folder: Path, share: float = 0.3) -> SpeechLLM:
    model = build(models, encoder={"path": str(folder), "spec_augment": share}, modality="speech")
    model.augment = (7, 2)
    return model.train()


@torch.no_grad()
def test_masked_clips_do_not_depend_on_the_batch(models: Path, folder: Path, examples: list[Example]) -> None:
    """Frames are masked in training only."""
    model = augmented(models, folder)
    together = model.clips(examples)
    assert all(close(model.clips([example])[0], together[row]) for row, example in enumerate(examples))
    assert all(map(close, model.clips(examples[::-1]), together[::-1]))
    plain = torch.cat(augmented(models, folder, share=0.0).clips(examples))
    assert not close(torch.cat(together), plain, 1e-2)
    assert close(torch.cat(model.eval().clips(examples)), plain)


def test_masks_follow_from_seed_epoch_and_utterance(models: Path, folder: Path, examples: list[Example]) -> None:
    model, long = augmented(models, folder), examples[-1]

    def mask(seed: int, epoch: int, example: Example = long) -> list[bool]:
        model.augment = (seed, epoch)
        return model._time_masks([example], [np.zeros(len(long.pcm), np.float32)])[0].tolist()

    assert mask(7, 2) == mask(7, 2)
    assert 0 < sum(mask(7, 2)) < len(mask(7, 2))
    assert mask(7, 2) not in [mask(8, 2), mask(7, 3), mask(7, 2, examples[0])]


def test_every_epoch_has_other_masks(models: Path, corpus: Shards, tmp_path: Path) -> None:
    augments: list[tuple[int, int]] = []
    trial = Trial(train=TrainConfig(epochs=2, batch_size=64))
    model, data = trial.start(models, corpus)
    fit(model, data, trial.train, ONE, 7, tmp_path, lambda epoch, metrics: augments.append(model.augment))
    assert augments == [(7, 0), (7, 1)]


@pytest.mark.parametrize("n_frames", [1, 2, 3, 7, 10, 19, 20, 250])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.65, 0.99])
def test_time_mask_hides_spans_but_never_all_frames(n_frames: int, share: float) -> None:
    masks = [draw_time_mask(n_frames, share, np.random.default_rng(seed)) for seed in range(300)]
    assert all(mask.shape == (n_frames,) and mask.dtype == bool and not mask.all() for mask in masks)
    assert np.array_equal(masks[7], draw_time_mask(n_frames, share, np.random.default_rng(7)))
    hidden = np.mean(masks)
    assert hidden <= share * 1.1 + 0.02
    assert hidden == 0 if share == 0 or n_frames == 1 else hidden >= share * 0.4
    if n_frames == 250 and share == 0.1:
        edges = [np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)) for mask in masks]
        assert min(np.diff(edge)[::2].min() for edge in edges if len(edge)) == 10
