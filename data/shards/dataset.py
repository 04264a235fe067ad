"""Arrow shards of a prepared corpus: written once, then memory-mapped, or read from a store, by everybody.

manifest.json           what the corpus is; it is written last, so a folder without one is unfinished
index-<hash>.arrow      every turn without its audio, and where its audio lies: shard, offset and length in bytes
shard-<hash>.arrow      the turns of some conversations with their audio (uncompressed IPC: any row is one read)
findings.jsonl          every finding of the preparation, one a line
report.html             the same for people
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc
from pydantic import ValidationError

from data.corpus import audio
from data.corpus.schema import SAMPLE_RATE, SCHEMA_VERSION
from data.errors import DataError, reason
from data.shards.format import INDEX_SCHEMA, Manifest, _whole, fold_split
from data.shards.store import Store

MAPPED = 24  # shards that are memory-mapped at a time: 1.5 GB at most of what jobs.SHARD_BYTES makes of them
MANIFEST, FINDINGS = "manifest.json", "findings.jsonl"


def is_shards(place: Path | str) -> bool:
    """Whether a prepared corpus may be there: a URL, or a folder with a manifest."""
    return "://" in str(place) or (Path(place) / MANIFEST).exists()


class Shards:
    """A prepared corpus. Pickles as its place alone, so it travels to any worker.

    Args:
        folder: where `sweep prepare` put it: a folder, or a URL.
        fold: the fold for test, of a corpus with folds; else 0.
    """

    def __init__(self, folder: Path | str, fold: int = 0) -> None:
        self.folder, self.fold = folder, fold
        self.store = Store(folder)
        try:
            self.manifest = Manifest.model_validate_json(self.store.read(MANIFEST))
        except FileNotFoundError:
            raise DataError(f"{folder}: no manifest.json; make the shards with `sweep prepare`") from None
        except ValidationError as error:
            raise DataError(_unreadable(self.store, error)) from None
        got = (self.manifest.schema_version, self.manifest.sample_rate)
        if got != (SCHEMA_VERSION, SAMPLE_RATE):
            raise DataError(_version(folder, got))
        folds = self.manifest.config.split.folds
        if fold >= (folds or 1):
            has = f"{folds} folds, counted from 0" if folds else "no folds; prepare it with --set split.folds=5"
            raise DataError(f"{folder}: data.fold is {fold}, and the corpus has {has}")

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path | str, int]]:
        return Shards, (self.folder, self.fold)

    @property
    def fingerprint(self) -> str:
        """Names the content and the split."""
        folds = self.manifest.config.split.folds
        return f"{self.manifest.fingerprint}-{self.fold}" if folds else self.manifest.fingerprint

    def verify(self) -> None:
        """Read everything once and compare it with the manifest.

        Raises:
            DataError: names the first file that is missing or differs.
        """
        expected = {shard.name: shard.sha256 for shard in self.manifest.shards}
        for name, sha256 in {**expected, self.manifest.index: self.manifest.index_sha256}.items():
            with self._open(name) as file:
                digest = hashlib.sha256()
                while block := file.read_buffer(1 << 24):
                    digest.update(block)
            if digest.hexdigest() != sha256:
                raise DataError(f"{self.store / name}: the file is corrupt (its sha256 is not the manifest's); {AGAIN}")

    @cached_property
    def index(self) -> pa.Table:
        """Every turn without its audio; row numbers of the project are rows of this table."""
        with self._open(self.manifest.index) as file:
            try:
                return _whole(ipc.open_file(file), INDEX_SCHEMA)
            except (pa.ArrowException, OSError, ValueError) as error:
                name = self.store / self.manifest.index
                raise DataError(f"{name}: not a readable Arrow file ({reason(error)}); {AGAIN}") from None

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The index as Python lists: a few MB for ten thousand turns, and quick to look up."""
        found = {name: self.index[name].to_pylist() for name in self.index.column_names}
        if folds := self.manifest.config.split.folds:
            found["split"] = [fold_split(fold, self.fold, folds) for fold in found["fold"]]
        return found

    @cached_property
    def sessions(self) -> list[range]:
        """By row: the rows of its conversation, which lie together."""
        found: list[range] = []
        for _, run in itertools.groupby(self.columns["conversation"]):
            rows = range(len(found), len(found) + len(list(run)))
            found += [rows] * len(rows)
        return found

    @cached_property
    def _file(self) -> Callable[[int], Any]:
        """Opens a shard by number; mapped ones are given back in turn, or a large corpus would fill the memory."""
        return functools.lru_cache(MAPPED if self.store.local else None)(self._open_shard)

    def _open_shard(self, shard: int) -> Any:
        file = self._open(self.manifest.shards[shard].name)
        return file if self.store.local is None else memoryview(file.read_buffer())

    @cached_property
    def _checked(self) -> bytearray:
        return bytearray(self.index.num_rows)

    def pcm(self, row: int) -> np.ndarray | None:
        """The clip of a row as int16 samples [n_samples]; None without sound. Not a copy where it is memory-mapped.

        Raises:
            DataError: names the shard that is missing, or the utterance whose bytes differ from their checksum.
        """
        columns = self.columns
        if columns["n_samples"][row] == 0:
            return None
        content, pcm = self._bytes(row), None
        # A page that was right once stays right: the checksum costs as much as all other reading.
        if self._checked[row] or audio.checksum(content) == columns["crc32"][row]:
            with contextlib.suppress(ValueError, RuntimeError):  # of bytes that never were a clip
                pcm = audio.decode(content, self.manifest.config.codec)
        if pcm is None or pcm.shape != (columns["n_samples"][row],):
            name = self.store / self.manifest.shards[columns["shard"][row]].name
            raise DataError(f"{name}: utterance {columns['id'][row]} is corrupt (checksum or length differs); {AGAIN}")
        self._checked[row] = True
        return pcm

    def _bytes(self, row: int) -> bytes | memoryview:
        """The stored bytes of a row; fewer where the file is too short."""
        columns, offset = self.columns, self.columns["offset"][row]
        shard, end = columns["shard"][row], offset + columns["length"][row]
        if not (0 <= shard < len(self.manifest.shards) and 0 <= offset <= end):
            raise DataError(f"{self.store / self.manifest.index}: row {row} lies in no shard; {AGAIN}")
        file = self._file(shard)
        content: bytes | memoryview = file[offset:end] if self.store.local else file.read_at(end - offset, offset)
        return content

    def _open(self, name: str) -> pa.NativeFile:
        try:
            return self.store.open(name)
        except FileNotFoundError:
            raise DataError(f"{self.store / name}: the file is missing; {AGAIN}") from None
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.store / name}: cannot be read ({reason(error)}); {AGAIN}") from None


AGAIN = "prepare the corpus again"


def _unreadable(store: Store, error: ValidationError) -> str:
    detail = error.errors()[0]
    place = ".".join(map(str, detail["loc"])) or "file"
    return f"{store / MANIFEST}: {place}: {detail['msg']}; {AGAIN}"


def _version(folder: Path | str, got: tuple[str, int]) -> str:
    return f"{folder}: written as (version, Hz) {got}; this program reads {(SCHEMA_VERSION, SAMPLE_RATE)}: {AGAIN}"
