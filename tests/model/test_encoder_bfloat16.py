"""Encoders in bfloat16 and mixed precision: the same labels, alone and batched."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.corpus.audio import MIN_SAMPLES
from data.corpus.schema import SAMPLE_RATE
from model.encoders.base import SpeechEncoder
from tests.conftest import ENCODERS
from tests.model.encoders import CLIPS, encode, fresh, masks_of, noise


def sound(n_samples: int, seed: int) -> np.ndarray:
    """Gliding tones in noise: clips that differ enough to get different labels from a random classifier."""
    rng = np.random.default_rng(seed)
    time_N = np.arange(n_samples) / SAMPLE_RATE
    tones_N = sum(
        rng.random() * np.sin(2 * np.pi * pitch * time_N * (1 + 0.3 * rng.standard_normal() * time_N))
        for pitch in rng.uniform(80, 4000, 3)
    )
    swell_N = 0.2 + np.abs(np.sin(np.pi * rng.uniform(0.5, 4) * time_N))
    noise_N = rng.choice([0.02, 0.2, 1.0]) * rng.standard_normal(n_samples)
    return (rng.uniform(0.01, 0.3) * (tones_N * swell_N + noise_N)).astype(np.float32)


SOUNDS = [sound(int(n_samples), seed) for seed, n_samples in enumerate(np.linspace(MIN_SAMPLES, SAMPLE_RATE, 120))]


@torch.no_grad()
def means(encoder: SpeechEncoder, size: int) -> Tensor:
    """The mean frame of every sound, in batches of mixed lengths, [clips, D]."""
    order = np.random.default_rng(0).permutation(len(SOUNDS)).tolist()
    found: dict[int, Tensor] = {}
    for batch in (order[start : start + size] for start in range(0, len(order), size)):
        frames = encode(encoder, [SOUNDS[place] for place in batch])
        found |= {place: row.float().mean(0) for place, row in zip(batch, frames, strict=True)}
    return torch.stack([found[place] for place in range(len(SOUNDS))])


@pytest.mark.parametrize("kind", ENCODERS)
def test_bfloat16_gives_the_same_labels_alone_and_batched(kind: str, models: Path) -> None:
    """By a fixed random classifier, whose bias centres it on the clips: every label is used."""
    usual_D = means(fresh(models / kind), 8).mean(0)
    encoder = fresh(models / kind, "bfloat16")
    weight_DK = torch.randn(encoder.width, 3, generator=torch.Generator().manual_seed(0))
    alone, batched = (((means(encoder, size) - usual_D) @ weight_DK).argmax(1) for size in (1, 8))
    assert alone.bincount(minlength=3).min() >= 5
    assert (alone == batched).float().mean() >= 0.99


@pytest.mark.parametrize("kind", ENCODERS)
def test_mixed_precision_trains_and_leaves_nothing_behind(kind: str, models: Path) -> None:
    encoder = fresh(models / kind)
    expected = encode(encoder, CLIPS[:3])
    with torch.autocast("cpu", torch.bfloat16):
        frames = encode(encoder.train(), CLIPS[:3], masks_of(encoder, CLIPS[:3]))
        torch.cat(frames).square().mean().backward()
    assert torch.cat(frames).isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
    again = encode(encoder.eval(), CLIPS[:3])
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@pytest.mark.parametrize("kind", ["conformer-rotary", "w2v-bert-rotary"])
def test_rotary_positions_stay_apart_in_bfloat16(kind: str, folders: dict[str, Path]) -> None:
    encoder = fresh(folders[kind], "bfloat16")
    encode(encoder, [noise(7 * SAMPLE_RATE, 1)])
    cosines = encoder.model.encoder.embed_positions.cached_rotary_positional_embedding[0, :, 0, 0, 0]
    positions = torch.arange(encoder.num_frames(7 * SAMPLE_RATE))
    assert len(positions) > 300
    assert (cosines.float() - positions.cos()).abs().max() < 0.01
