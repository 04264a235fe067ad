"""Choose the decoder of a recording: libsndfile where it reads the whole file, else FFmpeg.

libsndfile believes what headers announce, and estimates the length of an MP3 without one. WAV and FLAC cost nothing
more than before: their length is checked by the size of the file, or by one look at its end.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from data.corpus import ffmpeg
from data.corpus.headers import PatchedFile, data_length

if TYPE_CHECKING:
    from soundfile import SoundFile

_NO_LENGTH = 1 << 62  # frames; libsndfile's value for an unknown length
_ADDED = 0.5  # s that FFmpeg must find beyond libsndfile's length before it replaces libsndfile
_ID3 = b"ID3"


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
