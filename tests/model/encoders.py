"""Encoders of every kind and variant, and what the tests of encoders do with them."""

import copy
import json
import shutil
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.corpus.audio import MIN_SAMPLES
from data.corpus.schema import SAMPLE_RATE
from model.encoders.base import SpeechEncoder
from model.encoders.loading import load_encoder
from model.encoders.spec_augment import draw_time_mask
from tests import tiny_models
from tests.model.common import close

LONG = 7 * SAMPLE_RATE // 2  # several windows of Whisper, and distances that WavLM no longer tells apart
BELOW = 200  # samples: too few for a frame of any kind but Whisper
VARIANTS = {  # supported, but not in the layout of a published checkpoint
    "hubert-batch-norm": partial(tiny_models.random_hubert, norm="group", conv_pos_batch_norm=True),
    "hubert-without-specaugment": partial(tiny_models.random_hubert, norm="layer", mask_time_prob=0.0),
    "conformer-group": partial(tiny_models.random_conformer, positions="relative", norm="group"),
    "conformer-no-positions": partial(tiny_models.random_conformer, positions=None),
    "w2v-bert-relative": partial(tiny_models.random_w2v_bert, positions="relative"),
    "whisper-clip": tiny_models.ENCODERS["whisper"],
    "w2v-bert-rotary": partial(tiny_models.random_w2v_bert, positions="rotary"),
}


def fresh(folder: Path, dtype: str = "float32") -> SpeechEncoder:
    """Return an encoder that no other test has: a copy, which takes less time than to load it again.

    The folder's name says if it reads clips at their length.
    """
    encoder = copy.deepcopy(_loaded(folder, dtype))
    encoder.set_context("clip" if folder.name == "whisper-clip" else "window")
    return encoder


@cache
def _loaded(folder: Path, dtype: str) -> SpeechEncoder:
    return load_encoder.__wrapped__(str(folder), "cpu", dtype)


def noise(n_samples: int, seed: int) -> np.ndarray:
    """Return a clip with a random level and offset."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.01, 0.3) * rng.standard_normal(n_samples) + rng.uniform(-0.05, 0.05)).astype(np.float32)


CLIPS = [noise(n_samples, seed) for seed, n_samples in enumerate((MIN_SAMPLES, 5637, 20801, LONG))]


def split(
    encoder: SpeechEncoder, frames_BFD: Tensor, given: Sequence[int], clips: Sequence[np.ndarray]
) -> list[Tensor]:
    """Return the frames of each clip, whose number must follow from the formula, and check that the rest is zero."""
    lengths = [encoder.num_frames(len(clip)) for clip in clips]
    assert given == lengths
    assert frames_BFD.shape == (len(clips), max(lengths), encoder.width)
    assert not any(row[length:].any() for row, length in zip(frames_BFD, lengths, strict=True))
    return [row[:length] for row, length in zip(frames_BFD, lengths, strict=True)]


def encode(
    encoder: SpeechEncoder, clips: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None
) -> list[Tensor]:
    return split(encoder, *encoder(clips, masks), clips)


def same(frames: Sequence[Tensor], reference: Sequence[Tensor]) -> bool:
    return all(
        bool(row.isfinite().all()) and row.shape == expected.shape and close(row, expected)
        for row, expected in zip(frames, reference, strict=True)
    )


@torch.no_grad()
def invariant(encoder: SpeechEncoder, clips: Sequence[np.ndarray] = CLIPS) -> bool:
    """Whether a clip's frames are the same alone, next to the longest one, and in batches of all in two orders."""
    alone = [encode(encoder, [clip])[0] for clip in clips]
    every = list(range(len(clips)))
    longest = max(every, key=lambda index: len(clips[index]))
    batches = [*([index, longest] for index in every if index != longest), every[::-1], every[1::2] + every[::2]]
    return all(
        same(encode(encoder, [clips[index] for index in batch]), [alone[index] for index in batch]) for batch in batches
    )


def edited(folder: Path, to: Path, config: dict[str, Any], extractor: dict[str, Any] | None = None) -> Path:
    """Copy a model's folder and change its settings."""
    shutil.copytree(folder, to)
    for name, changes in (("config.json", config), ("preprocessor_config.json", extractor or {})):
        path = to / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


def without_dropout(folder: Path, to: Path) -> SpeechEncoder:
    """Load an encoder in training mode; layer drop, SpecAugment and batch norm stay as the checkpoint has them."""
    settings = json.loads((folder / "config.json").read_text())
    return fresh(edited(folder, to, {name: 0.0 for name in settings if "dropout" in name})).train()


def masks_of(encoder: SpeechEncoder, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    counts = [encoder.num_frames(len(clip)) for clip in clips]
    seeds = [len(clip) for clip in clips]
    return [
        draw_time_mask(count, 0.4, np.random.default_rng(seed), span=4)
        for count, seed in zip(counts, seeds, strict=True)
    ]


def gradient(parameters: Sequence[Tensor], frames: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the gradient of a fixed linear function of all frames, summed over batches; None counts as nothing."""
    for parameter in parameters:
        parameter.grad = None
    for batch in frames:
        direction_D = torch.randn(batch[0].shape[1], generator=torch.Generator().manual_seed(0))
        torch.stack([(row @ direction_D).sum() for row in batch]).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
