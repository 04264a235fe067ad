"""Encoders of every kind and variant, and what the tests of encoders do with them."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
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

LONG = 6 * SAMPLE_RATE
BELOW = 200  # samples: fewer than any kind but Whisper needs for a frame
VARIANTS = {  # accepted too, but not of a published layout that ENCODERS has
    "hubert-batch-norm": partial(tiny_models.random_hubert, norm="group", conv_pos_batch_norm=True),
    "hubert-without-specaugment": partial(tiny_models.random_hubert, norm="layer", mask_time_prob=0.0),
    "conformer-group": partial(tiny_models.random_conformer, positions="relative", norm="group"),
    "conformer-no-positions": partial(tiny_models.random_conformer, positions=None),
    "w2v-bert-relative": partial(tiny_models.random_w2v_bert, positions="relative"),
    "w2v-bert-rotary": partial(tiny_models.random_w2v_bert, positions="rotary"),
}


def fresh(folder: Path, dtype: str = "float32") -> SpeechEncoder:
    """An encoder that no other test has."""
    return load_encoder.__wrapped__(str(folder), "cpu", dtype)


def noise(n_samples: int, seed: int) -> np.ndarray:
    """A clip with a level and an offset of its own."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.01, 0.3) * rng.standard_normal(n_samples) + rng.uniform(-0.05, 0.05)).astype(np.float32)


CLIPS = [noise(n_samples, seed) for seed, n_samples in enumerate((MIN_SAMPLES, 5637, 20801, LONG))]


def encode(
    encoder: SpeechEncoder, clips: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None
) -> list[Tensor]:
    """The frames of each clip, of the length that the one formula says and zero beyond it."""
    frames_BFD, lengths_B = encoder(clips, masks)
    lengths = [encoder.num_frames(len(clip)) for clip in clips]
    assert lengths_B.tolist() == lengths
    assert frames_BFD.shape == (len(clips), max(lengths), encoder.width)
    for row, length in zip(frames_BFD, lengths, strict=True):
        assert not row[length:].any()
    return [row[:length] for row, length in zip(frames_BFD, lengths, strict=True)]


def same(frames: Sequence[Tensor], reference: Sequence[Tensor]) -> bool:
    return all(
        bool(one.isfinite().all()) and one.shape == other.shape and close(one, other)
        for one, other in zip(frames, reference, strict=True)
    )


# Training -------------------------------------------------------------------------------------------------------------


def edited(folder: Path, to: Path, config: dict[str, Any], extractor: dict[str, Any] | None = None) -> Path:
    """A copy of a model's folder with other settings."""
    shutil.copytree(folder, to)
    for name, changes in (("config.json", config), ("preprocessor_config.json", extractor or {})):
        path = to / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


def without_dropout(folder: Path, to: Path) -> SpeechEncoder:
    """In training mode; layer drop, SpecAugment and batch norm stay as the checkpoint has them."""
    settings = json.loads((folder / "config.json").read_text())
    copy = edited(folder, to, {name: 0.0 for name in settings if "dropout" in name})
    return fresh(copy).train()


def masks_of(encoder: SpeechEncoder, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [
        draw_time_mask(encoder.num_frames(len(clip)), 0.4, np.random.default_rng(len(clip)), span=4) for clip in clips
    ]


def gradient(encoder: SpeechEncoder, batches: Sequence[Sequence[int]]) -> Tensor:
    """Of the frames of all clips times a fixed vector, summed, cut into batches; for every trained parameter."""
    direction_D = torch.randn(encoder.width, generator=torch.Generator().manual_seed(0))
    encoder.zero_grad()
    for batch in batches:
        clips = [CLIPS[place] for place in batch]
        frames = encode(encoder, clips, masks_of(encoder, clips))
        torch.stack([(row @ direction_D).sum() for row in frames]).sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in gradients if part is not None])
