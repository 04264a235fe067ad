"""Read a prepared corpus: Arrow shards that are memory-mapped, or read from a store behind a URL.

manifest.json           description of the corpus; it is written last, so a folder without it is incomplete
index-<hash>.arrow      every turn without audio, and the location of its audio: shard, offset and length in bytes
shard-<hash>.arrow      the turns of some conversations with audio (uncompressed IPC, so a row is a single read)
findings.jsonl          all findings of the preparation, one per line
report.html             report about the corpus
README.md               card of the corpus
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
from data.corpus.codebook import Merge
from data.corpus.schema import SAMPLE_RATE, SCHEMA_VERSION, split_label
from data.errors import DataError, reason
from data.shards.format import INDEX_SCHEMA, Manifest, fold_split, read_table
from data.shards.store import Store

MAPPED = 24  # shards that are memory-mapped at the same time, 1.5 GB with the default shard size
AGAIN = "prepare the corpus again"
MANIFEST, FINDINGS = "manifest.json", "findings.jsonl"


def is_corpus(address: Path | str) -> bool:
    """Return whether an address may be a prepared corpus: a URL, or a folder with a manifest."""
    return "://" in str(address) or (Path(address) / MANIFEST).exists()


class Shards:
    """A prepared corpus. A pickle contains only address and fold, so it is cheap to send to a worker.

    Args:
        folder: folder or URL that `sweep prepare` wrote.
        fold: test fold of a corpus with folds, else 0.
        codes: level of the codebook whose classes are the labels; None: the codes as they are stored.

    Raises:
        DataError: there is no corpus, it is damaged or of another version, or it has no such fold or level.
    """

    def __init__(self, folder: Path | str, fold: int = 0, codes: str | None = None) -> None:
        self.folder, self.fold, self.codes = folder, fold, codes
        self.store = Store(folder)
        try:
            self.stored = Manifest.model_validate_json(self.store.read(MANIFEST))
        except FileNotFoundError:
            raise DataError(f"{folder}: no manifest.json; make the shards with `sweep prepare`") from None
        except ValidationError as error:
            detail = error.errors()[0]
            field = ".".join(map(str, detail["loc"])) or "file"
            raise DataError(f"{self.store / MANIFEST}: {field}: {detail['msg']}; {AGAIN}") from None
        version, expected = (self.stored.schema_version, self.stored.sample_rate), (SCHEMA_VERSION, SAMPLE_RATE)
        if version != expected:
            raise DataError(f"{folder}: its (version, Hz) is {version}, this program needs {expected}; {AGAIN}")
        folds = self.stored.config.split.folds
        if fold >= (folds or 1):
            has = f"{folds} folds, counted from 0" if folds else "no folds; prepare it with --set split.folds=5"
            raise DataError(f"{folder}: data.fold is {fold}, but the corpus has {has}")

        self.merge = None if codes is None else self._merge(codes)

    def _merge(self, level: str) -> Merge:
        book = self.stored.config.codebook
        if book is None:
            raise DataError(
                f"{self.folder}: data.codes is {level!r}, but the corpus has no codebook; set it to null, or rerun "
                "`sweep prepare` with --set codebook=NAME"
            )
        return book.merge(level)

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path | str, int, str | None]]:
        return Shards, (self.folder, self.fold, self.codes)

    @cached_property
    def manifest(self) -> Manifest:
        """Return the manifest with the classes of the level as labels; without a level, as it is stored."""
        if self.merge is None:
            return self.stored
        counts = {part: dict.fromkeys(self.merge.labels, 0) for part in self.stored.sessions}
        which = "split" if self.stored.config.split.folds is None else "fold"
        for part, label in zip(self.index[which].to_pylist(), self.columns["label"], strict=True):
            for name in split_label(label) if label is not None else ():
                counts[str(part)][name] += 1
        return self.stored.model_copy(
            update={
                "labels": self.merge.labels,
                "roles": self.merge.roles,
                "label_counts": counts,
                # Another level is another corpus for sweeps and checkpoints, although the shards are the same.
                "fingerprint": f"{self.stored.fingerprint}+{self.merge.digest}",
            }
        )

    @property
    def fingerprint(self) -> str:
        """Return the hash of content, split and classes."""
        return self._with_fold(self.manifest.fingerprint)

    @property
    def stored_fingerprint(self) -> str:
        """Return the hash of content and split, which is the same for all levels of a codebook."""
        return self._with_fold(self.stored.fingerprint)

    def _with_fold(self, fingerprint: str) -> str:
        return f"{fingerprint}-{self.fold}" if self.stored.config.split.folds else fingerprint

    def verify(self) -> None:
        """Compare the checksums of all files with the manifest.

        Raises:
            DataError: a file is missing or differs; the message names the first one.
        """
        expected = {shard.name: shard.sha256 for shard in self.stored.shards}
        for name, sha256 in {**expected, self.stored.index: self.stored.index_sha256}.items():
            with self._open(name) as file:
                digest = hashlib.sha256()
                while block := file.read_buffer(1 << 24):
                    digest.update(block)
            if digest.hexdigest() != sha256:
                raise DataError(f"{self.store / name}: the file is corrupt (its sha256 is not the manifest's); {AGAIN}")

    @cached_property
    def index(self) -> pa.Table:
        """Return all turns without audio; a `row` is a row number of this table in the whole project."""
        with self._open(self.stored.index) as file:
            try:
                return read_table(ipc.open_file(file), INDEX_SCHEMA)
            except (pa.ArrowException, OSError, ValueError) as error:
                name = self.store / self.stored.index
                raise DataError(f"{name}: not a readable Arrow file ({reason(error)}); {AGAIN}") from None

    @cached_property
    def stored_codes(self) -> dict[str, str]:
        """Return, by id, the codes of labelled turns as they are stored, before a level merges them."""
        pairs = zip(self.columns["id"], self.index["label"].to_pylist(), strict=True)
        return {name: code for name, code in pairs if code is not None}

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """Return the index as Python lists, which are fast to look up; a few MB for ten thousand turns."""
        columns = {name: self.index[name].to_pylist() for name in self.index.column_names}
        if (merge := self.merge) is not None:
            votes = [dict(row or ()) for row in columns["votes"]]
            turns = list(zip(columns["speaker"], columns["label"], votes, strict=True))
            columns["label"] = [merge.label(*turn) for turn in turns]
            columns["votes"] = [list(merge.votes(role, given).items()) or None for role, _, given in turns]
        if folds := self.stored.config.split.folds:
            columns["split"] = [fold_split(fold, self.fold, folds) for fold in columns["fold"]]
        return columns

    @cached_property
    def sessions(self) -> list[range]:
        """Return, for each row, the consecutive rows of its conversation."""
        sessions: list[range] = []
        for _, run in itertools.groupby(self.columns["conversation"]):
            rows = range(len(sessions), len(sessions) + len(list(run)))
            sessions += [rows] * len(rows)
        return sessions

    @cached_property
    def _file(self) -> Callable[[int], memoryview | pa.NativeFile]:
        """Return a function that opens a shard by number and unmaps the least recently used one of MAPPED."""
        return functools.lru_cache(MAPPED if self.store.local else None)(self._open_shard)

    def _open_shard(self, shard: int) -> memoryview | pa.NativeFile:
        file = self._open(self.stored.shards[shard].name)
        return file if self.store.local is None else memoryview(file.read_buffer())

    @cached_property
    def _checked(self) -> bytearray:
        return bytearray(self.index.num_rows)

    def pcm(self, row: int) -> np.ndarray | None:
        """Return the clip of a row, int16 [n_samples], or None without audio; memory-mapped pcm16 is not copied.

        Raises:
            DataError: the shard is missing, or the bytes of the utterance differ from their checksum.
        """
        columns = self.columns
        if columns["n_samples"][row] == 0:
            return None
        content, pcm = self._bytes(row), None
        # Each clip is checked only once, because the checksum costs as much as all other reading.
        if self._checked[row] or audio.checksum(content) == columns["crc32"][row]:
            with contextlib.suppress(ValueError, RuntimeError):  # the bytes are not a clip
                pcm = audio.decode(content, self.stored.config.codec)
        if pcm is None or pcm.shape != (columns["n_samples"][row],):
            name = self.store / self.stored.shards[columns["shard"][row]].name
            raise DataError(f"{name}: utterance {columns['id'][row]} is corrupt (checksum or length differs); {AGAIN}")
        self._checked[row] = True
        return pcm

    def _bytes(self, row: int) -> bytes | memoryview:
        """Return the stored bytes of a row; fewer if the file is too short."""
        columns, offset = self.columns, self.columns["offset"][row]
        shard, end = columns["shard"][row], offset + columns["length"][row]
        if not (0 <= shard < len(self.stored.shards) and 0 <= offset <= end):
            raise DataError(f"{self.store / self.stored.index}: the location of row {row} is invalid; {AGAIN}")
        file = self._file(shard)
        if isinstance(file, memoryview):
            return file[offset:end]
        content: bytes = file.read_at(end - offset, offset)
        return content

    def _open(self, name: str) -> pa.NativeFile:
        try:
            return self.store.open(name)
        except FileNotFoundError:
            raise DataError(f"{self.store / name}: the file is missing; {AGAIN}") from None
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.store / name}: cannot be read ({reason(error)}); {AGAIN}") from None
