"""Files of what frozen models make of a corpus: computed once, then memory-mapped by every trial, epoch and sweep.

<cache>/<kind>/<key>/about.json            what they are: all that the numbers depend on, besides what was read
<cache>/<kind>/<key>/<kind>-<hash>.arrow   the arrays of some rows, named by what was read for them

A file is an Arrow IPC file of one record batch, with a column of bytes for each array of a row. It is written in one
move, so it is there whole or not at all.
"""

import hashlib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from data.errors import DataError, StorageError, reason
from data.shards.store import Store

ABOUT = "about.json"
Row = TypeVar("Row", bound=Hashable)
Layout = Mapping[str, str]  # the arrays of a row: name → type of their numbers


@dataclass(frozen=True)
class Part(Generic[Row]):
    """Rows whose arrays make up a file."""

    name: str  # of the file
    rows: tuple[Row, ...]
    sizes: tuple[int, ...]  # of what is read for each: samples, or tokens

    @property
    def size(self) -> int:
        """Of what is read for all of them."""
        return sum(self.sizes)


def named(kind: str, read: str, rows: Sequence[Row], sizes: Iterable[int]) -> Part[Row]:
    """The part of some rows; `read` says what is read for them, and nothing else."""
    return Part(f"{kind}-{hashlib.sha256(read.encode()).hexdigest()[:16]}.arrow", tuple(rows), tuple(sizes))


def runs(sized: Iterable[tuple[Row, Hashable, int]], most: int) -> list[list[Row]]:
    """Rows with a group and a size each → runs within a group, which end where they do whatever comes later.

    The first ones are short, so that a small corpus, too, is work for several processes: their ends lie at
    `most` / 32, / 16 … / 2; all further ones are of about `most`.
    """
    found: dict[tuple[Hashable, int], list[Row]] = {}
    before: dict[Hashable, int] = {}  # by group
    for row, group, size in sized:
        share = before.get(group, 0) / most
        place = math.floor(share) + 5 if share >= 1 else math.frexp(max(share, 1 / 64))[1] + 5
        found.setdefault((group, place), []).append(row)
        before[group] = before.get(group, 0) + size
    return list(found.values())


def missing(folder: Path, parts: Sequence[Part[Row]]) -> list[Part[Row]]:
    """Those that have not been computed yet."""
    return [part for part in parts if not (folder / part.name).exists()]


def write(folder: Path, part: Part[Any], layout: Layout, rows: Iterable[Sequence[np.ndarray]]) -> int:
    """Write a file in one move.

    Args:
        folder: of the key.
        part: that it holds.
        layout: of its rows.
        rows: the arrays of each, [T, width].

    Returns:
        The bytes of the arrays.

    Raises:
        StorageError: the folder cannot be written.
    """
    columns = [
        [np.ascontiguousarray(values, kind) for values in column]
        for kind, column in zip(layout.values(), zip(*rows, strict=True), strict=True)
    ]
    assert all(len(column) == len(part.rows) for column in columns)
    widths = ",".join(str(column[0].shape[1]) for column in columns)
    schema = pa.schema([pa.field(name, pa.large_binary()) for name in layout], {"width": widths})
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([_as_bytes(column) for column in columns], schema=schema))
    try:
        Store(folder).write(part.name, sink.getvalue())
    except DataError as error:
        raise StorageError(f"{error}; free some space, or set storage.cache to another folder") from None
    return sum(values.nbytes for column in columns for values in column)


def _as_bytes(column: Sequence[np.ndarray]) -> pa.Array:
    borders = np.cumsum([0, *(values.nbytes for values in column)], dtype=np.int64)
    content = np.concatenate([values.ravel() for values in column])
    buffers = [None, pa.py_buffer(borders), pa.py_buffer(content)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(column), buffers)


class _Column(NamedTuple):
    """An array of all rows of a file."""

    values: np.ndarray  # of all rows, flat
    borders: list[int]  # of the rows, in bytes
    width: int

    def read(self, place: int) -> np.ndarray:
        start, end = (border // self.values.itemsize for border in self.borders[place : place + 2])
        return self.values[start:end].reshape(-1, self.width)


class Files(Generic[Row]):
    """The arrays of rows, memory-mapped: opened in a moment, and all processes of a node share the pages.

    Args:
        folder: of their key.
        parts: the files.
        layout: of a row.

    Raises:
        StorageError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, parts: Sequence[Part[Row]], layout: Layout) -> None:
        self.places = {row: (part.name, place) for part in parts for place, row in enumerate(part.rows)}
        self.files = {name: _open(folder / name, layout) for name in {part.name for part in parts}}

    def arrays(self, row: Row) -> list[np.ndarray]:
        """Of a row: [T, width] each, not copies."""
        name, place = self.places[row]
        return [column.read(place) for column in self.files[name]]


def _open(path: Path, layout: Layout) -> list[_Column]:
    try:
        with pa.memory_map(str(path)) as file:
            reader: Any = ipc.open_file(file)
            batch, widths = reader.get_batch(0), reader.schema.metadata[b"width"].decode().split(",")
        found = []
        for (name, kind), width in zip(layout.items(), widths, strict=True):
            _, borders, content = batch.column(name).buffers()
            found.append(_Column(np.frombuffer(content, kind), np.frombuffer(borders, np.int64).tolist(), int(width)))
        return found
    except FileNotFoundError:
        raise StorageError(
            f"{path}: not seen from here; storage.cache must lie on storage that all nodes share, or set "
            "storage.features=live"
        ) from None
    except (OSError, ValueError, KeyError, IndexError) as error:  # Arrow's own errors are among them
        raise StorageError(f"{path}: damaged ({reason(error)}); delete it, it will be computed again") from None
