"""Frozen encoders: what they make of a clip is computed once, and is the same wherever and however it is computed.

A clip is encoded by itself and its features are rounded to float16, also where they are not kept in files: so a trial
gets the same bits with and without them, and beside whatever other clips. The same goes for the lower layers of an
encoder whose upper layers train.

Legend: B one clip, F frames, D width of the encoder, T windows of the adapter (or frames, where it does not pool).
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from data.config import DataConfig
from data.corpus.audio import waveform
from data.loading import feature_files as features
from data.loading.array_files import Part
from data.loading.examples import clip_of
from data.shards.dataset import Shards
from model.checkpoints.fingerprint import Keyed, computing, model_digest
from model.config import ModelConfig
from model.encoders.base import SpeechEncoder
from model.encoders.loading import load_encoder

VERSION = 2  # raise it when the same encoder would give other features, or the files would be cut otherwise
LARGEST = float(torch.finfo(torch.float16).max)
# The layers that are computed (0: all, and what follows them), and window and stride of an average over frames.
Kept = tuple[int, tuple[int, int] | None]


@dataclass(frozen=True)
class CacheKey(Keyed):
    """What features depend on, besides the sound itself."""

    place: ClassVar[str] = "encoder"
    encoder: str  # Hugging Face id or folder
    digest: str  # of its weights and of its configuration
    dtype: str
    precision: str
    device: str  # cpu or cuda: they differ in the last digits
    layers: int  # computed, from the first on; 0: all, and what follows them
    pool: tuple[int, int] | None  # window and stride, where the adapter's pooling has no parameters
    sound: str  # see `DataConfig.sound`; shuffled clips have the features of their own rows
    snr_db: float | None
    version: int = VERSION

    @property
    def kept(self) -> Kept:
        """What is kept of a clip."""
        return self.layers, self.pool

    @property
    def reading(self) -> str:
        """Equal for features that one pass of the encoder yields."""
        return replace(self, layers=0, pool=None).key


def recipe(model: ModelConfig, data: DataConfig, device: str, layers: int = 0) -> CacheKey:
    """The features that a frozen encoder gives a trial, or its frozen layers (see `SpeechLLM.frozen_layers`)."""
    return CacheKey(
        encoder=model.encoder.path,
        digest=encoder_digest(model.encoder.path),
        dtype=model.encoder.dtype,
        precision=model.precision,
        device=device,
        layers=layers,
        pool=pooling(model, layers),
        sound="recorded" if data.sound == "shuffled" else data.sound,
        snr_db=data.snr_db if data.sound == "noisy" else None,
    )


def pooling(model: ModelConfig, layers: int = 0) -> tuple[int, int] | None:
    """Window and stride of an adapter that averages, whose part of the work belongs to a frozen encoder's features."""
    return (model.adapter.window, model.adapter.stride) if model.adapter.kind == "pool" and not layers else None


@functools.lru_cache(maxsize=8)
def encoder_digest(path: str) -> str:
    """Equal for encoders that give the same frames. Reads all weights.

    Raises:
        ConfigError: see `load_encoder`.
    """
    encoder = inspect.unwrap(load_encoder)(path, "cpu")  # not to be kept: it may be large
    return model_digest(encoder.state_dict(), encoder.model.config.to_dict() | encoder.extractor.to_dict())


@torch.no_grad()
def clip_features(encoder: SpeechEncoder, pcm: np.ndarray, kept: Sequence[Kept]) -> list[Tensor]:
    """The features of a clip, [T, D] in float16, for all that is to be kept of one pass.

    Args:
        encoder: frozen, in eval mode.
        pcm: int16 samples at 16 kHz.
        kept: see `Kept`; a clip shorter than one window is filled with zeros to it.
    """
    states = encoder.layer_inputs(waveform(pcm), {layers for layers, _ in kept})
    return [_rounded(states[layers].float(), pool) for layers, pool in kept]


def _rounded(frames_FD: Tensor, pool: tuple[int, int] | None) -> Tensor:
    if pool is not None:
        window, stride = pool
        filled_FD = F.pad(frames_FD, (0, 0, 0, max(0, window - len(frames_FD))))
        with torch.autocast(frames_FD.device.type, enabled=False):
            frames_FD = F.avg_pool1d(filled_FD.T[None], window, stride)[0].T
    return frames_FD.clamp(-LARGEST, LARGEST).half()


@dataclass(frozen=True)
class Job:
    """The features of a part of a corpus, to be computed in one pass: travels to the process that does it."""

    shards: Shards
    part: Part[int]
    config: DataConfig
    recipes: Mapping[Path, CacheKey]  # by the folders of their keys; all of one reading
    threads: int

    def compute(self, rows: Sequence[int]) -> list[list[np.ndarray]]:
        """The features of some rows, by recipe."""
        some, *_ = self.recipes.values()
        encoder = load_encoder(some.encoder, some.device, some.dtype)
        config = self.config.model_copy(update={"sound": some.sound})
        kept = [own.kept for own in self.recipes.values()]
        with computing(self.threads, some.device, some.precision):
            found = [
                [own.cpu().numpy() for own in clip_features(encoder, clip_of(self.shards, row, config), kept)]
                for row in rows
            ]
        return [list(own) for own in zip(*found, strict=True)]

    def __call__(self) -> pa.Table:
        """Compute and write them; a table with the bytes and the samples."""
        computed = self.compute(self.part.rows)
        written = [features.write(folder, self.part, computed.pop(0)) for folder in self.recipes]  # held no longer
        return pa.table({"bytes": [sum(written)], "size": [self.part.size]})
