"""What a frozen encoder makes of clips, in files: computed once, then memory-mapped by every trial, epoch and sweep.

<cache>/features/<key>/about.json               what they are: encoder, pooling, precision, sound
<cache>/features/<key>/features-<hash>.arrow    those of some clips of a shard, named by what is heard in them

So a corpus that grows keeps what it has, other labels or splits change nothing, and corpora may share a folder.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from data.config import DataConfig
from data.errors import DataError, StorageError, reason
from data.schema import SAMPLE_RATE
from data.shards import Shards
from data.store import Store

ABOUT = "about.json"
PART_SAMPLES = 600 * SAMPLE_RATE  # of a file: ten minutes of sound, which is what a kill may lose
BYTES = 2  # of a number: float16


@dataclass(frozen=True)
class Part:
    """Clips of a shard whose features make up a file."""

    name: str  # of the file
    rows: tuple[int, ...]  # of the corpus
    samples: int


def parts(shards: Shards, config: DataConfig) -> list[Part]:
    """The files that hold the features of a corpus, whose clips are heard as `config.sound` says."""
    return _parts(shards, config.sound)


@functools.lru_cache(maxsize=4)
def _parts(shards: Shards, sound: str) -> list[Part]:
    # Noise is drawn by the utterance's name, and silence has a length only; else the sound says it all.
    heard = {"noisy": ("audio_hash", "id"), "zeroed": ("n_samples",)}.get(sound, ("audio_hash",))
    found = []
    for rows in _runs(shards):
        said = json.dumps([[shards.columns[name][row] for name in heard] for row in rows])
        name = f"features-{hashlib.sha256(said.encode()).hexdigest()[:16]}.arrow"
        found.append(Part(name, tuple(rows), sum(shards.columns["n_samples"][row] for row in rows)))
    return found


def _runs(shards: Shards) -> list[list[int]]:
    """Rows with a clip that lie together in a shard, of about PART_SAMPLES."""
    runs: dict[tuple[int, int], list[int]] = {}
    before: dict[int, int] = {}  # samples so far, by shard
    for row, (shard, samples) in enumerate(zip(shards.columns["shard"], shards.columns["n_samples"], strict=True)):
        if samples > 0:
            runs.setdefault((shard, before.get(shard, 0) // PART_SAMPLES), []).append(row)
            before[shard] = before.get(shard, 0) + samples
    return list(runs.values())


def write(folder: Path, part: Part, features: Iterable[np.ndarray]) -> int:
    """Write a file in one move.

    Args:
        folder: of the key.
        part: that it holds.
        features: of each of its rows, float16 [T, D].

    Returns:
        Its bytes.

    Raises:
        StorageError: the folder cannot be written.
    """
    rows = [np.ascontiguousarray(values, "<f2") for values in features]
    assert len(rows) == len(part.rows)
    schema = pa.schema([pa.field("features", pa.large_binary())], {"width": str(rows[0].shape[1])})
    borders = np.cumsum([0, *(values.nbytes for values in rows)], dtype=np.int64)
    content = np.concatenate([values.ravel() for values in rows])
    buffers = [None, pa.py_buffer(borders), pa.py_buffer(content)]
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), buffers)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([column], schema=schema))
    try:
        Store(folder).write(part.name, sink.getvalue())
    except DataError as error:
        raise StorageError(f"{error}; free some space, or set storage.cache to another folder") from None
    return content.nbytes


def missing(folder: Path, shards: Shards, config: DataConfig) -> list[Part]:
    """What has not been computed yet."""
    return [part for part in parts(shards, config) if not (folder / part.name).exists()]


class Features:
    """The features of a corpus, memory-mapped: opened in a moment, and all processes of a node share the pages.

    Args:
        folder: of their key.
        shards: the corpus.
        config: how it is heard.

    Raises:
        StorageError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, shards: Shards, config: DataConfig) -> None:
        self.folder = folder
        self.places = {row: (part.name, place) for part in parts(shards, config) for place, row in enumerate(part.rows)}
        for name in {name for name, _ in self.places.values()}:
            self._file(name)

    def read(self, row: int) -> np.ndarray:
        """Of a row with a clip: float16 [T, D], not a copy."""
        name, place = self.places[row]
        values, borders, width = self._file(name)
        found: np.ndarray = values[borders[place] // BYTES : borders[place + 1] // BYTES].reshape(-1, width)
        return found

    @functools.cached_property
    def _files(self) -> dict[str, tuple[np.ndarray, list[int], int]]:
        return {}

    def _file(self, name: str) -> tuple[np.ndarray, list[int], int]:
        if name not in self._files:
            self._files[name] = _open(self.folder / name)
        return self._files[name]


def _open(path: Path) -> tuple[np.ndarray, list[int], int]:
    """All numbers of a file, the borders of its rows in bytes, and their width."""
    try:
        with pa.memory_map(str(path)) as file:
            reader: Any = ipc.open_file(file)
            _, borders, content = reader.get_batch(0).column(0).buffers()
            width = int(reader.schema.metadata[b"width"])
        return np.frombuffer(content, "<f2"), np.frombuffer(borders, np.int64).tolist(), width
    except FileNotFoundError:
        raise StorageError(
            f"{path}: not seen from here; storage.cache must lie on storage that all nodes share, or set "
            "storage.features=live"
        ) from None
    except (OSError, pa.ArrowInvalid, KeyError, IndexError) as error:
        raise StorageError(f"{path}: damaged ({reason(error)}); delete it, it will be computed again") from None
