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
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data import audio
from data.corpus_config import CorpusConfig
from data.errors import DataError, reason
from data.findings import Finding
from data.schema import SAMPLE_RATE, SCHEMA_VERSION, TURN_SCHEMA
from data.split import fold_split
from data.store import Store

MAPPED = 24  # shards that are memory-mapped at a time: 1.5 GB at most of what jobs.SHARD_BYTES makes of them
ROWS_PER_BATCH = 64  # of an IPC record batch; 16 to 256 read equally fast
MANIFEST, FINDINGS = "manifest.json", "findings.jsonl"
_PLACE = [pa.field("offset", pa.int64(), nullable=False), pa.field("length", pa.int64(), nullable=False)]
SHARD_INDEX_SCHEMA = pa.schema([*TURN_SCHEMA.remove(TURN_SCHEMA.get_field_index("audio")), *_PLACE])
INDEX_SCHEMA = pa.schema(
    [
        *SHARD_INDEX_SCHEMA,
        pa.field("group", pa.string(), nullable=False),  # what the split did not cut
        pa.field("split", pa.dictionary(pa.int16(), pa.string())),  # null where there are folds
        pa.field("fold", pa.int16()),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("where", pa.string(), nullable=False),  # file:line of the source
    ]
)
FileName = Annotated[str, Field(pattern=r"^[a-z]+-[0-9a-f]+\.arrow$")]  # a manifest must not lead out of its folder


class ShardInfo(BaseModel):
    """One shard file of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: FileName
    rows: int
    bytes: int
    hours: float  # of usable sound
    sha256: str
    conversations: dict[str, str]  # id → key of what it was made from


class Manifest(BaseModel):
    """What a prepared corpus is; `fingerprint` names its content and does not depend on how it is sharded."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: str
    corpus: str
    fingerprint: str
    sample_rate: int
    labels: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]
    qualities: tuple[str, ...]  # of whole sessions
    config: CorpusConfig  # how it was prepared
    index: FileName
    index_sha256: str
    shards: tuple[ShardInfo, ...]
    sessions: dict[str, int]  # by split, or by fold
    turns: dict[str, int]
    hours: dict[str, float]  # of usable sound
    label_counts: dict[str, dict[str, int]]  # split or fold → label → turns
    rejected: int  # turns
    findings: dict[str, int]  # by code


class ShardFile:
    """A shard as it was written: its entry in the manifest, its part of the index, and what was found in it."""

    def __init__(self, info: ShardInfo, index: pa.Table, findings: list[Finding]) -> None:
        self.info, self.index, self.findings = info, index, findings

    @classmethod
    def known(cls, info: ShardInfo, index: pa.Table, file: pa.NativeFile) -> "ShardFile":
        """A shard of a manifest: of the file itself only the findings are read."""
        return cls(info, index.select(SHARD_INDEX_SCHEMA.names).cast(SHARD_INDEX_SCHEMA), _said(ipc.open_file(file))[0])

    def to_arrow(self) -> pa.Table:
        """One row, the form in which it crosses processes."""
        said = {"info": self.info.model_dump_json(), "findings": _findings_json(self.findings)}
        return pa.Table.from_pylist([{**said, "index": to_bytes(self.index).to_pybytes()}])

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "ShardFile":
        """The inverse of `to_arrow`."""
        [row] = table.to_pylist()
        findings = [Finding.from_dict(finding) for finding in json.loads(row["findings"])]
        return cls(ShardInfo.model_validate_json(row["info"]), ipc.open_file(row["index"]).read_all(), findings)


def _findings_json(findings: Sequence[Finding]) -> str:
    return json.dumps([finding.as_dict() for finding in findings])


def encode_shard(
    name: str, rows: Sequence[dict[str, Any]], conversations: dict[str, str], findings: Sequence[Finding]
) -> tuple[pa.Buffer, ShardFile]:
    """The bytes of a shard, and what there is to know about it.

    Args:
        name: of the file.
        rows: by TURN_SCHEMA; `audio` in the corpus' codec.
        conversations: id → key of what it was made from.
        findings: about these conversations; they travel in the file, so that it can be used again.
    """
    said = {
        "findings": _findings_json(findings),
        "conversations": json.dumps(conversations),
        "schema_version": SCHEMA_VERSION,
    }
    table = pa.Table.from_pylist(list(rows), TURN_SCHEMA.with_metadata(said))
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
    buffer = sink.getvalue()
    return buffer, describe_shard(name, buffer)


def describe_shard(name: str, buffer: pa.Buffer) -> ShardFile:
    """What there is to know about a shard's bytes: also those that another attempt wrote.

    Raises:
        DataError: they are no shard.
    """
    try:
        file = ipc.open_file(buffer)
        table = _whole(file, TURN_SCHEMA)
        findings, conversations = _said(file)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{name}: not a readable shard ({reason(error)}); prepare the corpus again") from None
    index = table.drop_columns("audio")
    offsets, lengths = _places(table["audio"], buffer.address)
    for column, values in zip(_PLACE, (offsets, lengths), strict=True):
        index = index.append_column(column, pa.array(values, pa.int64()))
    samples = sum(table["n_samples"].to_pylist())
    info = ShardInfo(
        name=name,
        rows=table.num_rows,
        bytes=buffer.size,
        hours=samples / SAMPLE_RATE / 3600,
        sha256=hashlib.sha256(buffer).hexdigest(),
        conversations=conversations,
    )
    return ShardFile(info, index.cast(SHARD_INDEX_SCHEMA), findings)


def _whole(file: ipc.RecordBatchFileReader, schema: pa.Schema) -> pa.Table:
    """The table of a file, every offset of which leads into the file: Arrow would follow any.

    Raises:
        ArrowInvalid: one does not, or its columns are others.
    """
    table = file.read_all()
    if not table.schema.equals(schema):
        raise pa.ArrowInvalid("its columns are not those of a corpus")
    table.validate(full=True)
    if holes := [field.name for field in schema if not field.nullable and table[field.name].null_count]:
        raise pa.ArrowInvalid(f"{holes[0]} has holes")
    return table


def _said(file: ipc.RecordBatchFileReader) -> tuple[list[Finding], dict[str, str]]:
    said = {key.decode(): value.decode() for key, value in (file.schema.metadata or {}).items()}
    return [Finding.from_dict(finding) for finding in json.loads(said["findings"])], json.loads(said["conversations"])


def _places(column: pa.ChunkedArray, base: int) -> tuple[list[int], list[int]]:
    """Where each value of a binary column lies in the file that starts at the address `base`: one read, no Arrow."""
    offsets: list[int] = []
    lengths: list[int] = []
    for chunk in column.chunks:
        bounds = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        data = chunk.buffers()[2]
        start = 0 if data is None else data.address - base
        offsets += (bounds[:-1] + start).tolist()
        lengths += np.diff(bounds).tolist()
    return offsets, lengths


def to_bytes(table: pa.Table) -> pa.Buffer:
    """A table as an Arrow IPC file, one record batch: dictionaries must not change inside a file."""
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks().unify_dictionaries())
    return sink.getvalue()


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
