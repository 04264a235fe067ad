"""The length that the header of an uncompressed recording announces, and the length that the file has.

A recorder writes the length when it stops. If it crashed, or if the file outgrew 32 bits, the header announces less
than the file contains, and libsndfile reads no more than that.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

UNKNOWN_32 = 0x7FFFF000  # bytes; programs that write to a pipe announce this length or more
_PADDING = 1 << 14  # bytes after the samples that may be padding or a tag, and are not read as samples
_LONGEST_HEADER = 1 << 24  # bytes of chunks before the samples, such as a picture


@dataclass(frozen=True, slots=True)
class DataLength:
    """The samples of a file in bytes, by its header and by its size."""

    announced: int | None  # None: the header says that the length is unknown
    actual: int
    patches: dict[int, bytes]  # offset → bytes of a header that announces `actual`

    @property
    def outdated(self) -> bool:
        """Return whether the file contains samples that the header does not announce."""
        return self.announced is None or self.announced < self.actual


def data_length(path: Path) -> DataLength | None:
    """Return the length of the samples in a WAV, RF64, AIFF, CAF or AU file; None for other formats.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(12)
        if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:] == b"WAVE":
            return _wave(file, size)
        if head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
            return _aiff(file, size)
        if head[:4] == b"caff":
            return _caf(file, size)
        if head[:4] == b".snd":
            start, announced = struct.unpack(">II", head[4:])
            known = None if announced == 0xFFFFFFFF else announced
            return _length(file, size, start, known, {8: struct.pack(">I", _at_most_32(size - start))})
    return None


def _at_most_32(length: int) -> int:
    return min(max(length, 0), 0xFFFFFFFF)


def _chunks(file: BinaryIO, form: str, first: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, position of the content and announced size of the chunks; `form` is the format of name and size."""
    place, length = first, struct.calcsize(form)
    while first <= place <= min(size - length, first + _LONGEST_HEADER):
        file.seek(place)
        name, announced = struct.unpack(form, file.read(length))
        yield name, place + length, announced
        place += length + announced + (announced % 2 if length == 8 else 0)


def _wave(file: BinaryIO, size: int) -> DataLength | None:
    wide: tuple[int, int] | None = None  # position and content of the 64-bit length
    for name, place, announced in _chunks(file, "<4sI", 12, size):
        if name == b"ds64" and announced >= 16:
            file.seek(place + 8)
            wide = (place + 8, *struct.unpack("<Q", file.read(8)))
        if name == b"data":
            if wide is not None:
                return _length(file, size, place, wide[1], {wide[0]: struct.pack("<Q", max(size - place, 0))})
            known = None if announced >= UNKNOWN_32 and announced > size - place else announced
            patches = {4: struct.pack("<I", _at_most_32(size - 8))}
            patches[place - 4] = struct.pack("<I", _at_most_32(size - place))
            return _length(file, size, place, known, patches)
    return None


def _aiff(file: BinaryIO, size: int) -> DataLength | None:
    for name, place, announced in _chunks(file, ">4sI", 12, size):
        if name == b"SSND":
            known = None if announced >= UNKNOWN_32 and announced > size - place else max(0, announced - 8)
            patches = {4: struct.pack(">I", _at_most_32(size - 8))}
            patches[place - 4] = struct.pack(">I", _at_most_32(size - place))
            return _length(file, size, place + 8, known, patches)
    return None


def _caf(file: BinaryIO, size: int) -> DataLength | None:
    for name, place, announced in _chunks(file, ">4sq", 8, size):
        if name == b"data":
            known = None if announced < 0 else max(0, announced - 4)
            return _length(file, size, place + 4, known, {place - 8: struct.pack(">q", size - place)})
    return None


def _length(file: BinaryIO, size: int, start: int, announced: int | None, patches: dict[int, bytes]) -> DataLength:
    actual = max(0, size - start)
    if announced is not None and announced < actual and _is_explained(file, start + announced, size, bool(announced)):
        actual = announced
    return DataLength(announced, actual, patches)


def _is_explained(file: BinaryIO, end: int, size: int, may_be_padded: bool) -> bool:
    """Return whether what follows the announced samples is a chain of chunks, or too short to be speech."""
    place = end + end % 2
    file.seek(place)
    while place + 8 <= size:
        head = file.read(8)
        lengths = (struct.unpack(order, head[4:])[0] for order in ("<I", ">I"))
        following = [place + 8 + length for length in lengths if place + 8 + length <= size + 1]
        if not all(0x20 <= letter < 0x7F for letter in head[:4]) or not following:
            return may_be_padded and size - place <= _PADDING
        place = max(following)
        place += place % 2
        file.seek(place)
    return True


class PatchedFile(io.RawIOBase):
    """A file of which some bytes are replaced while it is read."""

    def __init__(self, path: Path, patches: dict[int, bytes]) -> None:
        self.file = path.open("rb")
        self.patches = patches

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, and return it."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self.file.tell()

    def readinto(self, buffer: object) -> int:
        """Fill a buffer, and return the number of bytes."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        start = self.file.tell()
        length = self.file.readinto(view)
        for place, content in self.patches.items():
            first, last = max(place, start), min(place + len(content), start + length)
            if first < last:
                view[first - start : last - start] = content[first - place : last - place]
        return length

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()
