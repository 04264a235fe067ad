"""Cached features of a frozen encoder: the files that hold the clips of a corpus that a trial hears, and their reader.

A file has clips of one run of the corpus (see `split_into_files`), is named by a hash of their audio, and holds a hash
of each clip. So a sweep finds every clip that any sweep has encoded before, and encodes only the others: a corpus that
grows keeps its files, other labels or splits change nothing, and corpora may share a folder.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.corpus.schema import SAMPLE_RATE
from data.errors import MisfitError
from data.loading.cached_arrays import CacheFile, CacheReader, cache_file, split_into_files, stored_inputs
from data.loading.examples import audio_source_row
from data.loading.tasks import items
from data.shards.dataset import Shards

FILE_SAMPLES = 600 * SAMPLE_RATE  # largest size of a file, ten minutes of audio, which is what a kill may lose
BYTES_PER_VALUE = 2
LAYOUT = {"features": "<f2"}  # [T, D]


def feature_files(shards: Shards, config: DataConfig) -> list[CacheFile[int]]:
    """Return a file for each run of the clips of a corpus under `config.sound`; a row is one of the index."""
    return _feature_files(shards, config.sound)


@functools.lru_cache(maxsize=4)
def _feature_files(shards: Shards, sound: str) -> list[CacheFile[int]]:
    columns = shards.columns
    samples = columns["n_samples"]
    sized = ((row, shard, samples[row]) for row, shard in enumerate(columns["shard"]) if samples[row] > 0)
    return [_file(shards, sound, rows) for rows in split_into_files(sized, FILE_SAMPLES)]


def _file(shards: Shards, sound: str, rows: Sequence[int]) -> CacheFile[int]:
    # Noise is drawn by the utterance's id, and silence only has a length; otherwise the audio determines the features.
    names = {"noisy": ("audio_hash", "id"), "zeroed": ("n_samples",)}.get(sound, ("audio_hash",))
    columns = shards.columns
    inputs = [[columns[name][row] for name in names] for row in rows]
    hashes = [hashlib.sha256(json.dumps(of_row).encode()).hexdigest()[:16] for of_row in inputs]
    return cache_file("features", json.dumps(inputs), rows, [columns["n_samples"][row] for row in rows], hashes)


@functools.lru_cache(maxsize=32)
def heard_rows(shards: Shards, tasks: Sequence[str], sound: str) -> frozenset[int]:
    """Return the rows whose clips the items of some tasks use in training and validation.

    Args:
        shards: the corpus.
        tasks: names; a task without items has no clips.
        sound: see `DataConfig`.
    """
    config, rows = DataConfig.model_validate({"sound": sound}), set[int]()
    for task in tasks:
        with contextlib.suppress(MisfitError):  # a trial with this task reports it
            for split in ("train", "val"):
                heard = (audio_source_row(shards, item, config) for item in items(shards, task, split))
                rows |= {row for row in heard if row is not None}
    return frozenset(rows)


def stored_rows(folder: Path, shards: Shards, config: DataConfig) -> dict[int, tuple[str, int]]:
    """Return the rows whose features are in a folder: row → name of the file, and position in it.

    Files of earlier versions have no hashes of their clips: those of this corpus are known by their names.
    """
    runs = feature_files(shards, config)
    named = {file.name: file.inputs for file in runs}
    stored: dict[str, tuple[str, int]] = {}
    for path in sorted(folder.glob("features-*.arrow")):
        for index, digest in enumerate(named.get(path.name) or stored_inputs(str(path))):
            stored.setdefault(digest, (path.name, index))
    return {
        row: stored[digest]
        for file in runs
        for row, digest in zip(file.rows, file.inputs, strict=True)
        if digest in stored
    }


def files_with(folder: Path, shards: Shards, config: DataConfig, rows: Collection[int]) -> list[CacheFile[int]]:
    """Return the files that hold some rows, each with these rows only, and the missing files for all others.

    Args:
        folder: the folder of the cache key; it may not exist.
        shards: the corpus.
        config: how its clips are presented.
        rows: of the index, with clips.
    """
    stored, files = stored_rows(folder, shards, config), list[CacheFile[int]]()
    samples = shards.columns["n_samples"]
    by_name: dict[str, list[int]] = {}
    for run in feature_files(shards, config):
        wanted = [row for row in run.rows if row in rows]
        for row in wanted:
            if row in stored:
                by_name.setdefault(stored[row][0], []).append(row)
        if lacking := [row for row in wanted if row not in stored]:
            files.append(_file(shards, config.sound, lacking))
    held = [CacheFile(name, tuple(of), tuple(samples[row] for row in of)) for name, of in by_name.items()]
    return [*held, *files]


def missing_runs(shards: Shards, config: DataConfig, rows: Collection[int]) -> list[CacheFile[int]]:
    """Return new files for some rows: one for each run of the corpus that has any."""
    runs = ([row for row in run.rows if row in rows] for run in feature_files(shards, config))
    return [_file(shards, config.sound, run) for run in runs if run]


class FeatureReader(CacheReader[int]):
    """Reads the cached features of a corpus.

    Args:
        folder: the folder of the cache key.
        shards: the corpus.
        config: how its clips are presented.
        rows: that are read; None: all rows with a clip.

    Raises:
        StorageError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, shards: Shards, config: DataConfig, rows: Collection[int] | None = None) -> None:
        if rows is None:
            rows = [row for file in feature_files(shards, config) for row in file.rows]
        super().__init__(folder, files_with(folder, shards, config, rows), LAYOUT)
        self.positions |= stored_rows(folder, shards, config)

    def read(self, row: int) -> np.ndarray:
        """Return a view of the features of a row with a clip: float16 [T, D]."""
        return self.arrays(row)[0]
