"""Cached features of a frozen encoder: the files of a corpus, and their reader.

A file is named by a hash of the audio in it (see `cached_arrays`), so a corpus that grows keeps its files, other labels
or splits change nothing, and corpora may share a folder.
"""

import functools
import json
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.corpus.schema import SAMPLE_RATE
from data.loading.cached_arrays import CacheFile, CacheReader, cache_file, split_into_files
from data.shards.dataset import Shards

FILE_SAMPLES = 600 * SAMPLE_RATE  # largest size of a file, ten minutes of audio, which is what a kill may lose
BYTES_PER_VALUE = 2
LAYOUT = {"features": "<f2"}  # [T, D]


def feature_files(shards: Shards, config: DataConfig) -> list[CacheFile[int]]:
    """Return the files with the features of all clips of a corpus under `config.sound`; a row is one of the index."""
    return _feature_files(shards, config.sound)


@functools.lru_cache(maxsize=4)
def _feature_files(shards: Shards, sound: str) -> list[CacheFile[int]]:
    # Noise is drawn by the utterance's id, and silence only has a length; otherwise the audio determines the features.
    inputs = {"noisy": ("audio_hash", "id"), "zeroed": ("n_samples",)}.get(sound, ("audio_hash",))
    columns = shards.columns
    samples = columns["n_samples"]
    sized = ((row, shard, samples[row]) for row, shard in enumerate(columns["shard"]) if samples[row] > 0)
    return [
        cache_file(
            "features",
            json.dumps([[columns[name][row] for name in inputs] for row in rows]),
            rows,
            [samples[row] for row in rows],
        )
        for rows in split_into_files(sized, FILE_SAMPLES)
    ]


class FeatureReader(CacheReader[int]):
    """Reads the cached features of a corpus.

    Args:
        folder: the folder of the cache key.
        shards: the corpus.
        config: how its clips are presented.

    Raises:
        StorageError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, shards: Shards, config: DataConfig) -> None:
        super().__init__(folder, feature_files(shards, config), LAYOUT)

    def read(self, row: int) -> np.ndarray:
        """Return a view of the features of a row with a clip: float16 [T, D]."""
        return self.arrays(row)[0]
