"""The format of a shard: Arrow schema, index and manifest."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc
from pydantic import BaseModel, ConfigDict, Field

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.corpus.schema import SAMPLE_RATE, SCHEMA_VERSION, TURN_SCHEMA
from data.errors import DataError, reason

ROWS_PER_BATCH = 64  # of an IPC record batch; 16 to 256 read equally fast
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


def fold_split(fold: int, test: int, folds: int) -> str:
    """The split that a fold serves as when `test` is the fold for test: the next one is for val, the rest train."""
    return {test: "test", (test + 1) % folds: "val"}.get(fold, "train")
