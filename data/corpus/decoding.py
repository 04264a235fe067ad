"""Choose the decoder of a recording: libsndfile where it reads the whole file, else FFmpeg.

Audio in a cell of a table is decoded like a file.

libsndfile believes what headers announce, and estimates the length of an MP3 without one. WAV and FLAC cost nothing
more than before: their length is checked by the size of the file, or by one look at its end.
"""

import contextlib
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from data.corpus import ffmpeg
from data.corpus.headers import PatchedFile, data_length
from data.errors import reason

if TYPE_CHECKING:
    import pyarrow as pa
    from soundfile import SoundFile

_NO_LENGTH = 1 << 62  # frames; libsndfile's value for an unknown length
_ADDED = 0.5  # s that FFmpeg must find beyond libsndfile's length before it replaces libsndfile
_ID3 = b"ID3"
_CELLS = 8  # cells with audio that are read at a time
ARROW = ".arrow"


class Decoder(Protocol):
    """An open recording."""

    rate: int  # Hz
    channels: int
    announced: float | None  # s, by the header; None if it says nothing
    tolerance: float  # s by which a correct header may differ from what is decoded
    limit: float  # samples above it are no full-scale samples but a file that exceeds full scale
    filled: float  # s of silence for gaps, once all is read

    def read(self, frames: int) -> np.ndarray:
        """Return the next samples, float32 [n, n_channels]; less than `frames` only at the end."""

    def restart(self) -> None:
        """Start from the first sample again."""

    def close(self) -> None:
        """Close the file."""


class SndfileDecoder:
    """Reads a file with libsndfile; a WAV, AIFF, CAF or AU file to its end, whatever its header announces."""

    tolerance = 0.05
    filled = 0.0

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            soundfile.LibsndfileError: libsndfile cannot read it.
        """
        import soundfile

        length = data_length(path)
        self.patched = PatchedFile(path, length.patches) if length is not None and length.outdated else None
        try:
            self.file: SoundFile = soundfile.SoundFile(self.patched or path)
        except BaseException:
            if self.patched is not None:
                self.patched.close()
            raise
        self.rate, self.channels = self.file.samplerate, self.file.channels
        self.announced: float | None = self.file.frames / self.rate if self.rate else None
        if length is not None and length.actual and length.announced != length.actual and self.announced is not None:
            known = length.announced
            self.announced = None if known is None else self.announced * known / length.actual
        self.limit = 1.0 if self.file.subtype in ("FLOAT", "DOUBLE") else 1.25

    def read(self, frames: int) -> np.ndarray:
        """Return the next samples [n, n_channels]; less than `frames` only at the end."""
        block: np.ndarray = self.file.read(frames, dtype="float32", always_2d=True)
        return block

    def restart(self) -> None:
        """Start from the first sample again."""
        self.file.seek(0)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        if self.patched is not None:
            self.patched.close()


@dataclass(frozen=True, slots=True)
class StoredClip:
    """Audio in a cell of a Parquet or Arrow file: the bytes of an audio file, as Hugging Face datasets store them."""

    path: Path  # the table
    row: int  # in the file, from 0
    column: str

    @property
    def name(self) -> str:
        """Return "file:row" for messages, with rows from 1."""
        return f"{self.path.name}:{self.row + 1}"

    def __str__(self) -> str:
        return f"{self.path}:{self.row + 1}"

    def absolute(self) -> "StoredClip":
        """Return the same clip for a process with another working directory."""
        return StoredClip(self.path.absolute(), self.row, self.column)

    def mean_bytes(self) -> int:
        """Return the size of the table by row, an estimate of the size of the audio; 0 if it cannot be read."""
        import pyarrow as pa

        try:
            status = self.path.stat()
            return status.st_size // max(1, _rows(self.path, status.st_mtime_ns)[1])
        except (OSError, pa.ArrowException):
            return 0

    @contextlib.contextmanager
    def as_file(self) -> Iterator[Path]:
        """Write the audio to a temporary file, because decoders recognise a format by its file and open it twice.

        Raises:
            ValueError, OSError: the table cannot be read, or the cell is empty.
        """
        content = self._content()
        with tempfile.NamedTemporaryFile(prefix="clip-") as file:
            file.write(content)
            file.flush()
            yield Path(file.name)

    def _content(self) -> bytes:
        import pyarrow as pa

        try:
            stamp = self.path.stat().st_mtime_ns
            starts, _ = _rows(self.path, stamp)
            group = bisect_right(starts, self.row) - 1
            content = _cells(self.path, stamp, group, self.column).read(self.row - starts[group])
        except pa.ArrowException as error:
            raise ValueError(reason(error)) from None
        if not content:
            raise ValueError("the cell has no audio")
        return content


class _Cells:
    """Reads the cells of a row group in their order; going back begins again. No more than a few are in memory."""

    def __init__(self, path: Path, group: int, column: str) -> None:
        self.path, self.group, self.column = path, group, column
        self.start = 0  # row of the first of the cells that were read last
        self.cells: pa.Array | None = None
        self.batches = self._batches()

    def read(self, row: int) -> bytes | None:
        """Return a cell; None if it is empty or there is no such row."""
        if row < self.start:
            self.start, self.cells, self.batches = 0, None, self._batches()
        while self.cells is None or row >= self.start + len(self.cells):
            self.start += len(self.cells) if self.cells is not None else 0
            self.cells = next(self.batches, None)
            if self.cells is None:
                return None
        content = self.cells[row - self.start].as_py()
        return content if isinstance(content, bytes) else None

    def _batches(self) -> "Iterator[pa.Array]":
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        if self.path.suffix.lower() == ARROW:
            with pa.memory_map(str(self.path)) as file:
                for number, batch in enumerate(pa.ipc.open_stream(file)):
                    if number == self.group:
                        for start in range(0, len(batch), _CELLS):
                            yield _audio(batch.column(self.column).slice(start, _CELLS))
            return
        with ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
            nested = pa.types.is_struct(file.schema_arrow.field(self.column).type)
            columns = [f"{self.column}.bytes" if nested else self.column]
            for batch in file.iter_batches(_CELLS, row_groups=[self.group], columns=columns):
                yield _audio(batch.column(0))


def _audio(cells: "pa.Array") -> "pa.Array":
    import pyarrow as pa

    return cells.field("bytes") if pa.types.is_struct(cells.type) else cells


@lru_cache(maxsize=1)
def _cells(path: Path, stamp: int, group: int, column: str) -> _Cells:
    return _Cells(path, group, column)


@lru_cache(maxsize=64)
def _rows(path: Path, stamp: int) -> tuple[list[int], int]:
    """Return the first row of every row group of a file, or of every batch of an Arrow file, and the number of rows."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    if path.suffix.lower() == ARROW:
        with pa.memory_map(str(path)) as file:
            lengths = [len(batch) for batch in pa.ipc.open_stream(file)]
    else:
        with ParquetFile(path) as file:
            lengths = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    return [0, *accumulate(lengths[:-1])], sum(lengths)


@contextlib.contextmanager
def open_recording(path: Path) -> Iterator[Decoder]:
    """Open a recording with the decoder that reads all of it.

    Raises:
        ValueError, OSError: no decoder reads it.
    """
    decoder = _open(path)
    try:
        yield decoder
    finally:
        decoder.close()


def _open(path: Path) -> Decoder:
    import soundfile

    try:
        decoder = SndfileDecoder(path)
    except soundfile.LibsndfileError as error:
        try:
            return ffmpeg.FFmpegDecoder(path)
        except ValueError as other:
            raise ValueError(f"{getattr(error, 'error_string', error)} FFmpeg: {other}") from None
    try:
        better = _needs_ffmpeg(decoder, path)
        if better:
            announced = decoder.announced
            replacement = ffmpeg.FFmpegDecoder(path)
            replacement.announced = announced
            decoder.close()
            return replacement
    except BaseException:
        decoder.close()
        raise
    return decoder


def _needs_ffmpeg(decoder: SndfileDecoder, path: Path) -> bool:
    """Return whether FFmpeg finds more audio; if not, `announced` becomes None where libsndfile has estimated it."""
    kind, length = decoder.file.format, decoder.file.frames
    if decoder.rate < 1:
        return False
    known = length / decoder.rate
    if kind == "FLAC":
        if length >= _NO_LENGTH:
            decoder.announced = None
            return True
        end = ffmpeg.seconds(path, after=known)
    elif kind in ("MP3", "OGG"):
        end = ffmpeg.seconds(path)
    else:
        return False
    if end is not None and end > known + _ADDED:
        return True
    if kind == "MP3" and not _has_frame_count(path):
        decoder.announced = None
    return False


def _has_frame_count(path: Path) -> bool:
    """Return whether the first frame of an MP3 is a Xing, Info or VBRI header, which counts the frames."""
    with path.open("rb") as file:
        head = file.read(10)
        start = 0
        if head.startswith(_ID3) and len(head) == 10:
            start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        file.seek(start)
        first = file.read(2048)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))
