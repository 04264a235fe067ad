"""Arrow shards of a prepared corpus: written once, then memory-mapped by everybody.

DIR/manifest.json      what the corpus is: fingerprint, labels, shards with their hashes, splits, findings by code
DIR/index.arrow        every turn without its audio, and the shard that holds it
DIR/shard-00000.arrow  the turns with their audio (uncompressed IPC: any row is read in microseconds)
DIR/findings.jsonl     every finding of the preparation, one a line
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc
from pydantic import BaseModel, ConfigDict, ValidationError

from data.errors import DataError, reason
from data.schema import SAMPLE_RATE, SCHEMA_VERSION, TURN_SCHEMA

ROWS_PER_BATCH = 64  # of an IPC record batch; 16 to 256 read equally fast
SHARD_BYTES = 64 << 20
INDEX_SCHEMA = TURN_SCHEMA.remove(TURN_SCHEMA.get_field_index("audio")).append(
    pa.field("shard", pa.int32(), nullable=False)
)


class ShardInfo(BaseModel):
    """One shard file of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    rows: int
    bytes: int
    sha256: str


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
    split_seed: int
    split_fractions: tuple[float, float, float]
    shards: tuple[ShardInfo, ...]
    turns: dict[str, int]  # by split
    hours: dict[str, float]  # of usable sound, by split
    label_counts: dict[str, dict[str, int]]  # split → label → turns
    findings: dict[str, int]  # by code


class ShardWriter:
    """Writes turns in order into shards of about SHARD_BYTES and the index; `close` returns the shards' hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[ShardInfo] = []
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._index: list[dict[str, Any]] = []
        self._digests: list[bytes] = []

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the turns of one conversation; they share a shard."""
        for row in rows:
            row["crc32"] = zlib.crc32(row["audio"] or b"")
            self._digests.append(_digest(row))
            self._bytes += len(row["audio"] or b"")
        self._rows.extend(rows)
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def close(self) -> tuple[tuple[ShardInfo, ...], str]:
        """Finish the files.

        Returns:
            The shards, and the content's sha256.
        """
        self._flush()
        # One table, written at once: dictionaries must not change inside an IPC file.
        self._write("index.arrow", pa.Table.from_pylist(self._index, INDEX_SCHEMA))
        return tuple(self.shards), hashlib.sha256(b"".join(sorted(self._digests))).hexdigest()

    def _flush(self) -> None:
        if not self._rows:
            return
        number = len(self.shards)
        path = self._write(f"shard-{number:05d}.arrow", pa.Table.from_pylist(self._rows, TURN_SCHEMA))
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self.shards.append(ShardInfo(name=path.name, rows=len(self._rows), bytes=len(content), sha256=digest))
        self._index.extend({**row, "audio": None, "shard": number} for row in self._rows)
        self._rows, self._bytes = [], 0

    def _write(self, name: str, table: pa.Table) -> Path:
        path = self.folder / name
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
        return path


def _digest(row: dict[str, Any]) -> bytes:
    """Content hash of one turn: all that a model or a metric can see of it."""
    audio = hashlib.sha256(row["audio"] or b"").hexdigest()
    keys = "id conversation group index split speaker text label subset quality t_start t_end".split()
    return hashlib.sha256(json.dumps([[row[key] for key in keys], audio]).encode()).digest()


class Shards:
    """A prepared corpus, read through the page cache. Pickles as its folder alone, so it travels to any worker."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = Manifest.model_validate_json((self.folder / "manifest.json").read_bytes())
        except FileNotFoundError:
            raise DataError(f"{folder}: no manifest.json; make the shards with `sweep prepare`") from None
        except ValidationError as error:
            detail = error.errors()[0]
            place = ".".join(map(str, detail["loc"])) or "file"
            raise DataError(f"{folder}/manifest.json: {place}: {detail['msg']}; prepare the corpus again") from None
        got = (self.manifest.schema_version, self.manifest.sample_rate)
        if got != (SCHEMA_VERSION, SAMPLE_RATE):
            raise DataError(
                f"{folder}: written as (version, Hz) {got}; this program reads {(SCHEMA_VERSION, SAMPLE_RATE)}: "
                "prepare the corpus again"
            )

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path]]:
        return Shards, (self.folder,)

    def verify(self) -> None:
        """Read every shard once and compare its size and sha256 with the manifest.

        Raises:
            DataError: names the first shard that is missing or differs.
        """
        for shard in self.manifest.shards:
            path = self.folder / shard.name
            if not path.exists():
                raise DataError(f"{path}: the shard is missing; prepare the corpus again")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise DataError(f"{path}: the shard is corrupt (sha256 differs from the manifest's); prepare it again")
        if self.index.num_rows != sum(shard.rows for shard in self.manifest.shards):
            raise DataError(f"{self.folder}/index.arrow: its rows differ from the manifest's; prepare the corpus again")

    @cached_property
    def index(self) -> pa.Table:
        """Every turn without its audio; row numbers of the project are rows of this table."""
        return _read_table(self.folder / "index.arrow")

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The index as Python lists: a few MB for ten thousand turns, and quick to look up."""
        return {name: self.index[name].to_pylist() for name in self.index.column_names}

    @cached_property
    def sessions(self) -> list[range]:
        """By row: the rows of its conversation, which lie together."""
        found: list[range] = []
        for _, run in itertools.groupby(self.columns["conversation"]):
            rows = range(len(found), len(found) + len(list(run)))
            found += [rows] * len(rows)
        return found

    @cached_property
    def _audio(self) -> list[pa.ChunkedArray]:
        return [_read_table(self.folder / shard.name)["audio"] for shard in self.manifest.shards]

    @cached_property
    def _first_row(self) -> list[int]:
        return np.cumsum([0, *(shard.rows for shard in self.manifest.shards)]).tolist()  # type: ignore[no-any-return]

    def pcm(self, row: int) -> bytes | None:
        """The clip of a row as little-endian int16 bytes; None without sound.

        Raises:
            DataError: the bytes differ from the checksum written with them.
        """
        shard = self.columns["shard"][row]
        clip: bytes | None = self._audio[shard][row - self._first_row[shard]].as_py()
        if zlib.crc32(clip or b"") != self.columns["crc32"][row]:
            path = self.folder / self.manifest.shards[shard].name
            raise DataError(
                f"{path}: utterance {self.columns['id'][row]} is corrupt (checksum differs); prepare it again"
            )
        return clip


def _read_table(path: Path) -> pa.Table:
    try:
        return ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({reason(error)}); prepare the corpus again") from None
