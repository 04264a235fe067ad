"""The feature cache on disk: arrays that frozen models compute from a corpus once and every trial memory-maps.

<cache>/<kind>/<key>/about.json            the cache key: all that the numbers depend on, apart from the input rows
<cache>/<kind>/<key>/<kind>-<hash>.arrow   the arrays of some rows; the hash covers the input of these rows

A cache file is an Arrow IPC file of one record batch with a binary column for each array of a row. It is written
atomically, so it either exists completely or not at all.
"""

import functools
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from data.errors import DataError, StorageError, reason
from data.shards.store import Store

ABOUT = "about.json"
Row = TypeVar("Row", bound=Hashable)
Key = TypeVar("Key", bound="CacheKey")
Arrays = Sequence[np.ndarray]  # of one row: [T, width] each
Layout = Mapping[str, str]  # the arrays of a row: name → dtype


@dataclass(frozen=True)
class CacheKey:
    """Everything that cached numbers depend on, apart from the input rows. Subclasses add the fields."""

    path_field: ClassVar[str]  # the field with the path of the model, which its digest makes irrelevant
    later_fields: ClassVar[dict[str, object]] = {}  # what older caches lack, and the value that they were made with

    @property
    def key(self) -> str:
        """Return the cache key: a hash of all fields but the model's path."""
        absent = [(self.path_field, getattr(self, self.path_field)), *self.later_fields.items()]
        content = {name: value for name, value in asdict(self).items() if (name, value) not in absent}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CacheFile(Generic[Row]):
    """The rows whose arrays one file holds."""

    name: str
    rows: tuple[Row, ...]
    sizes: tuple[int, ...]  # the input size of each row: samples or tokens
    inputs: tuple[str, ...] = ()  # a hash of what the model reads for each row, where rows are found by it

    @property
    def size(self) -> int:
        """Return the input size of all rows."""
        return sum(self.sizes)


class CacheFolders(NamedTuple):
    """The cache folders that a trial reads; without one, it computes the numbers itself, with the same result."""

    features: tuple[Path, ...] = ()  # of its frozen encoder or encoder layers, in the order of `feature_specs`
    teacher_logits: Path | None = None  # of the teacher of its distillation


def cache_file(
    kind: str, content: str, rows: Sequence[Row], sizes: Iterable[int], inputs: Iterable[str] = ()
) -> CacheFile[Row]:
    """Return the file for some rows, named by a hash of `content`: what the model reads for these rows."""
    name = f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.arrow"
    return CacheFile(name, tuple(rows), tuple(sizes), tuple(inputs))


def split_into_files(sized: Iterable[tuple[Row, Hashable, int]], max_size: int) -> list[list[Row]]:
    """Split rows with a group and a size each into runs within a group, one for each file.

    A run ends at the same row whatever rows follow, so a corpus that grows keeps its files. The first runs of a group
    are short, so that several processes share the work also for a small corpus: they end at `max_size` / 32, / 16 …
    / 2; all further runs are about as large as `max_size`.
    """
    runs: dict[tuple[Hashable, int], list[Row]] = {}
    offsets: dict[Hashable, int] = {}  # by group
    for row, group, size in sized:
        share = offsets.get(group, 0) / max_size
        run = math.floor(share) + 5 if share >= 1 else math.frexp(max(share, 1 / 64))[1] + 5
        runs.setdefault((group, run), []).append(row)
        offsets[group] = offsets.get(group, 0) + size
    return list(runs.values())


def missing_files(folder: Path, files: Sequence[CacheFile[Row]]) -> list[CacheFile[Row]]:
    """Return the files that have not been computed yet."""
    return [file for file in files if not (folder / file.name).exists()]


@dataclass(frozen=True)
class CacheJob(ABC, Generic[Row, Key]):
    """Computes and writes one cache file; travels to the process that does it."""

    layout: ClassVar[Layout]
    file: CacheFile[Row]
    keys: Mapping[Path, Key]  # by folder; one forward pass computes the file for all of them
    threads: int

    @abstractmethod
    def compute(self, rows: Sequence[Row]) -> list[list[Arrays]]:
        """Return for each key the arrays of some rows, and write nothing."""

    def __call__(self) -> str:
        """Compute and write the file for all keys; return the file's name."""
        computed = self.compute(self.file.rows)
        for folder in self.keys:
            write_file(folder, self.file, self.layout, computed.pop(0))  # `pop` frees the arrays once they are written
        return self.file.name


def write_file(folder: Path, file: CacheFile[Row], layout: Layout, rows: Iterable[Arrays]) -> None:
    """Write a cache file atomically.

    Args:
        folder: the folder of the cache key.
        file: the file and its rows.
        layout: the arrays of a row.
        rows: the arrays of each row.

    Raises:
        StorageError: the folder cannot be written.
    """
    columns = [
        [np.ascontiguousarray(values, dtype) for values in column]
        for dtype, column in zip(layout.values(), zip(*rows, strict=True), strict=True)
    ]
    assert all(len(column) == len(file.rows) for column in columns)
    widths = ",".join(str(column[0].shape[1]) for column in columns)
    about = {"width": widths} | ({"inputs": json.dumps(file.inputs)} if file.inputs else {})
    schema = pa.schema([pa.field(name, pa.large_binary()) for name in layout], about)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([_to_binary(column) for column in columns], schema=schema))
    try:
        Store(folder).write(file.name, sink.getvalue())
    except DataError as error:
        raise StorageError(f"{error}; free some space, or set storage.cache to another folder") from None


def _to_binary(column: Arrays) -> pa.Array:
    """Return the arrays as one binary column, copied once."""
    offsets = np.cumsum([0, *(values.nbytes for values in column)], dtype=np.int64)
    content = np.concatenate([values.ravel() for values in column])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(column), buffers)


@functools.lru_cache(maxsize=4096)
def stored_inputs(path: str) -> tuple[str, ...]:
    """Return the hashes of the inputs in a file, by row; empty for files that have none, or are damaged."""
    try:
        with pa.memory_map(path) as file:
            return tuple(json.loads(ipc.open_file(file).schema.metadata[b"inputs"]))
    except (OSError, ValueError, KeyError, TypeError):  # Arrow's own errors are subclasses of these
        return ()


class _Column(NamedTuple):
    """One array of all rows of a file."""

    values: np.ndarray  # all rows, flat
    offsets: list[int]  # of the rows, in bytes
    width: int

    def read(self, index: int) -> np.ndarray:
        start, end = (offset // self.values.itemsize for offset in self.offsets[index : index + 2])
        return self.values[start:end].reshape(-1, self.width)


class CacheReader(Generic[Row]):
    """Reads the arrays of rows from memory-mapped files, whose pages all processes of a node share.

    Args:
        folder: the folder of the cache key.
        files: all files to read from.
        layout: the arrays of a row.

    Raises:
        StorageError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, files: Sequence[CacheFile[Row]], layout: Layout) -> None:
        self.positions = {row: (file.name, index) for file in files for index, row in enumerate(file.rows)}
        self.columns = {name: _open(folder / name, layout) for name in {file.name for file in files}}

    def arrays(self, row: Row) -> list[np.ndarray]:
        """Return views of the arrays of a row, [T, width] each."""
        name, index = self.positions[row]
        return [column.read(index) for column in self.columns[name]]


def _open(path: Path, layout: Layout) -> list[_Column]:
    try:
        with pa.memory_map(str(path)) as file:
            reader = ipc.open_file(file)
            batch, widths = reader.get_batch(0), reader.schema.metadata[b"width"].decode().split(",")
        columns = []
        for (name, dtype), width in zip(layout.items(), widths, strict=True):
            _, offsets, content = batch.column(name).buffers()
            values = np.frombuffer(content, dtype)
            columns.append(_Column(values, np.frombuffer(offsets, np.int64).tolist(), int(width)))
        return columns
    except FileNotFoundError:
        raise StorageError(
            f"{path}: not visible from this node; storage.cache must be on storage that all nodes share, or set "
            "storage.features=live"
        ) from None
    except (OSError, ValueError, KeyError, IndexError) as error:  # Arrow's own errors are subclasses of these
        raise StorageError(f"{path}: damaged ({reason(error)}); delete the file to have it computed again") from None
