"""The file formats of a prepared corpus: shards, index and manifest."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa
from pyarrow import ipc
from pydantic import BaseModel, ConfigDict, Field

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.corpus.schema import SAMPLE_RATE, SCHEMA_VERSION, TURN_SCHEMA, TurnRow
from data.errors import DataError, reason

ROWS_PER_BATCH = 64  # rows per IPC record batch; 16 to 256 are equally fast to read
IN_MEMORY = 1 << 25  # bytes of clips, 17 min; those of more go through temporary files
_LOCATION = [  # of the audio of a turn in its shard, bytes
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("length", pa.int64(), nullable=False),
]
SHARD_INDEX_SCHEMA = pa.schema([*TURN_SCHEMA.remove(TURN_SCHEMA.get_field_index("audio")), *_LOCATION])
INDEX_SCHEMA = pa.schema(
    [
        *SHARD_INDEX_SCHEMA,
        pa.field("group", pa.string(), nullable=False),  # see `Conversation.group`, connected by shared audio
        pa.field("split", pa.dictionary(pa.int16(), pa.string())),  # null if there are folds
        pa.field("fold", pa.int16()),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("where", pa.string(), nullable=False),  # file:line of the source
    ]
)
# The pattern prevents a manifest from naming files outside its folder.
FileName = Annotated[str, Field(pattern=r"^[a-z]+-[0-9a-f]+\.arrow$")]


class ShardInfo(BaseModel):
    """A shard in the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: FileName
    rows: int
    bytes: int
    hours: float  # of usable audio
    sha256: str
    conversations: dict[str, str]  # id → `conversation_key`


class Manifest(BaseModel):
    """The description of a prepared corpus. `fingerprint` is a hash of its content, independent of the shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: str
    corpus: str
    fingerprint: str
    sample_rate: int
    labels: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]
    qualities: tuple[str, ...]  # quality labels of sessions
    config: CorpusConfig  # settings of the preparation
    index: FileName
    index_sha256: str
    shards: tuple[ShardInfo, ...]
    sessions: dict[str, int]  # by split or fold, as `turns` and `hours`
    turns: dict[str, int]
    hours: dict[str, float]  # of usable audio
    label_counts: dict[str, dict[str, int]]  # split or fold → label → turns
    rejected: int  # number of rejected turns
    findings: dict[str, int]  # number of findings by code


class ShardFile:
    """The description of a written shard: its entry in the manifest, its part of the index, and its findings."""

    def __init__(self, info: ShardInfo, index: pa.Table, findings: list[Finding]) -> None:
        self.info, self.index, self.findings = info, index, findings

    @classmethod
    def from_manifest(cls, info: ShardInfo, index: pa.Table, file: pa.NativeFile) -> "ShardFile":
        """Return the description of a shard in a manifest; only its findings are read from the file."""
        findings, _ = _metadata(ipc.open_file(file))
        return cls(info, index.select(SHARD_INDEX_SCHEMA.names).cast(SHARD_INDEX_SCHEMA), findings)

    def to_arrow(self) -> pa.Table:
        """Return a table of one row, to send the description to another process."""
        row = {"info": self.info.model_dump_json(), "findings": _findings_json(self.findings)}
        return pa.Table.from_pylist([{**row, "index": to_bytes(self.index).to_pybytes()}])

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "ShardFile":
        """Return the description that `to_arrow` wrote."""
        [row] = table.to_pylist()
        findings = [Finding.from_dict(finding) for finding in json.loads(row["findings"])]
        return cls(ShardInfo.model_validate_json(row["info"]), ipc.open_file(row["index"]).read_all(), findings)


def _findings_json(findings: Sequence[Finding]) -> str:
    return json.dumps([finding.as_dict() for finding in findings])


class ClipStore:
    """Collects the encoded clips of a shard in the order of its rows: in memory, or in a temporary file if many."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 (closed by `__exit__`)
        self._lengths: list[int | None] = []

    def __enter__(self) -> "ClipStore":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, clip: bytes | None) -> None:
        """Add the clip of a row; None: it has none."""
        self._lengths.append(None if clip is None else len(clip))
        self._file.write(clip or b"")

    def batches(self, rows: int) -> Iterator[pa.Array]:
        """Yield the clips of so many rows at a time."""
        self._file.seek(0)
        for start in range(0, len(self._lengths), rows):
            lengths = self._lengths[start : start + rows]
            clips = [None if length is None else self._file.read(length) for length in lengths]
            yield pa.array(clips, pa.large_binary())

    @property
    def bytes(self) -> int:
        """The size of all clips."""
        return sum(length or 0 for length in self._lengths)


@contextlib.contextmanager
def encoded_shard(
    name: str, rows: Sequence[TurnRow], clips: ClipStore, conversations: dict[str, str], findings: Sequence[Finding]
) -> Iterator[tuple[pa.Buffer, ShardFile]]:
    """Provide the bytes of a shard and its description; a large one is in a temporary file, which is removed then.

    Args:
        name: file name.
        rows: rows of TURN_SCHEMA without `audio`.
        clips: `audio` of the rows, encoded with the codec of the corpus.
        conversations: id → `conversation_key`.
        findings: findings about these conversations; they are stored in the file, so that it can be reused.
    """
    metadata = {
        "findings": _findings_json(findings),
        "conversations": json.dumps(conversations),
        "schema_version": SCHEMA_VERSION,
    }
    schema = TURN_SCHEMA.with_metadata(metadata)
    place = schema.get_field_index("audio")
    table = pa.Table.from_pylist(list(rows), schema.remove(place)).combine_chunks()
    with contextlib.ExitStack() as stack:
        if clips.bytes > IN_MEMORY:
            file = stack.enter_context(tempfile.TemporaryFile())
            sink = pa.PythonFile(file, mode="w")
        else:
            sink = pa.BufferOutputStream()
        with ipc.new_file(sink, schema) as writer:
            batches = table.to_batches(max_chunksize=ROWS_PER_BATCH)
            for batch, audio in zip(batches, clips.batches(ROWS_PER_BATCH), strict=True):
                writer.write_batch(batch.add_column(place, schema.field(place), audio))
        if clips.bytes > IN_MEMORY:
            file.flush()
            buffer = pa.py_buffer(np.memmap(file, np.uint8, mode="r"))
        else:
            buffer = sink.getvalue()
        yield buffer, describe_shard(name, buffer)


def describe_shard(name: str, buffer: pa.Buffer) -> ShardFile:
    """Return the description of a shard from its bytes.

    Raises:
        DataError: the bytes are not a complete shard.
    """
    try:
        file = ipc.open_file(buffer)
        table = read_table(file, TURN_SCHEMA)
        findings, conversations = _metadata(file)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{name}: not a readable shard ({reason(error)}); prepare the corpus again") from None
    index = table.drop_columns("audio")
    offsets, lengths = _locations(table["audio"], buffer.address)
    for column, values in zip(_LOCATION, (offsets, lengths), strict=True):
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


def read_table(file: ipc.RecordBatchFileReader, schema: pa.Schema) -> pa.Table:
    """Read a table and validate its schema, null values and offsets, which Arrow does not check by itself.

    Raises:
        ArrowInvalid: the table is not valid.
    """
    table = file.read_all()
    if not table.schema.equals(schema):
        raise pa.ArrowInvalid("its columns are not those of a corpus")
    table.validate(full=True)
    if nulls := [field.name for field in schema if not field.nullable and table[field.name].null_count]:
        raise pa.ArrowInvalid(f"{nulls[0]} contains null values")
    return table


def _metadata(file: ipc.RecordBatchFileReader) -> tuple[list[Finding], dict[str, str]]:
    """Return the findings and conversation keys of a shard."""
    metadata = {key.decode(): value.decode() for key, value in (file.schema.metadata or {}).items()}
    findings = [Finding.from_dict(finding) for finding in json.loads(metadata["findings"])]
    return findings, json.loads(metadata["conversations"])


def _locations(column: pa.ChunkedArray, base: int) -> tuple[list[int], list[int]]:
    """Return offset and length of each value of a binary column in the file that is mapped at address `base`."""
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
    """Return a table as an Arrow IPC file with one record batch, because dictionaries must not change within a file."""
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks().unify_dictionaries())
    return sink.getvalue()


def fold_split(fold: int, test: int, folds: int) -> str:
    """Return the split of a fold if `test` is the test fold: the next fold is val, the others are train."""
    return {test: "test", (test + 1) % folds: "val"}.get(fold, "train")
