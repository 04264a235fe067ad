"""What a frozen encoder makes of clips, in files (see `data.frozen`) named by what is heard in them.

So a corpus that grows keeps what it has, other labels or splits change nothing, and corpora may share a folder.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.corpus.schema import SAMPLE_RATE
from data.loading import array_files as frozen
from data.loading.array_files import Files, Part, named, runs
from data.shards.dataset import Shards

PART_SAMPLES = 600 * SAMPLE_RATE  # of a file, at most: ten minutes of sound, which is what a kill may lose
BYTES = 2  # of a number
LAYOUT = {"features": "<f2"}  # [T, D]


def parts(shards: Shards, config: DataConfig) -> list[Part[int]]:
    """The files that hold the features of a corpus, whose clips are heard as `config.sound` says."""
    return _parts(shards, config.sound)


@functools.lru_cache(maxsize=4)
def _parts(shards: Shards, sound: str) -> list[Part[int]]:
    # Noise is drawn by the utterance's name, and silence has a length only; else the sound says it all.
    heard = {"noisy": ("audio_hash", "id"), "zeroed": ("n_samples",)}.get(sound, ("audio_hash",))
    columns = shards.columns
    samples = columns["n_samples"]
    sized = ((row, shard, samples[row]) for row, shard in enumerate(columns["shard"]) if samples[row] > 0)
    return [
        named(
            "features",
            json.dumps([[columns[name][row] for name in heard] for row in rows]),
            rows,
            [samples[row] for row in rows],
        )
        for rows in runs(sized, PART_SAMPLES)
    ]


def write(folder: Path, part: Part[int], features: Iterable[np.ndarray]) -> int:
    """Write the features of a part's rows, [T, D] each; see `frozen.write`."""
    return frozen.write(folder, part, LAYOUT, ([values] for values in features))


def missing(folder: Path, shards: Shards, config: DataConfig) -> list[Part[int]]:
    """What has not been computed yet."""
    return frozen.missing(folder, parts(shards, config))


class FeatureFiles(Files[int]):
    """The features of a corpus.

    Args:
        folder: of their key.
        shards: the corpus.
        config: how it is heard.

    Raises:
        StorageError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, shards: Shards, config: DataConfig) -> None:
        super().__init__(folder, parts(shards, config), LAYOUT)

    def read(self, row: int) -> np.ndarray:
        """Of a row with a clip: float16 [T, D], not a copy."""
        return self.arrays(row)[0]
