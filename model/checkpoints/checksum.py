"""Checksummed files of tensors and plain values: damage to any byte is noticed when they are read.

torch writes a zip archive, whose checksums it does not verify when it reads. So the archive gets a comment, which other
readers ignore: the sha256 of the archive without the comment.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

MARK = b"sha256:"
LENGTH = len(MARK) + 64
NO_COMMENT = b"\0\0"  # the last bytes of an archive without a comment: the length of the comment
BLOCK = 2**20


class DamagedError(Exception):
    """The file is not what was written; the message says what is wrong in a word."""


class _HashingWriter:
    """The file object that torch writes to."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.checksum = file, hashlib.sha256()
        self.error: OSError | None = None  # torch would replace it by an error of its own

    def write(self, content: bytes) -> int:
        try:
            written = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.checksum.update(content)
        return written

    def flush(self) -> None:
        """Do nothing: torch flushes before the file is complete."""


def write(path: Path, content: object) -> None:
    """Write a new file and flush it to the disk.

    Raises:
        OSError: as the system reports it.
    """
    with path.open("wb") as file:
        writer = _HashingWriter(file)
        try:
            torch.save(content, writer)  # type: ignore[arg-type]  # needs no more than `write` and `flush`
        except Exception as error:
            raise writer.error or error from None
        file.seek(-len(NO_COMMENT), os.SEEK_END)
        file.write(_comment(writer.checksum.hexdigest()))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[Any, bool]:
    """Return the content of a file (tensors and plain values, never code), and whether the file has a checksum.

    Raises:
        DamagedError: the checksum differs from that of the content, or torch cannot read it.
        OSError: the file cannot be read, whatever its content is.
    """
    with path.open("rb") as file:
        has_checksum = _verify(file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True), has_checksum
        except Exception as error:
            raise DamagedError(type(error).__name__) from None  # its message advises to load without the safeguards


def _comment(checksum: str) -> bytes:
    """Return the end of an archive: the length of the comment, and the comment."""
    return LENGTH.to_bytes(2, "little") + MARK + checksum.encode()


def _verify(file: BinaryIO) -> bool:
    """Return whether the file has a checksum.

    Raises:
        DamagedError: it has one that differs from that of its content.
    """
    remaining = file.seek(0, os.SEEK_END) - LENGTH - len(NO_COMMENT)
    if remaining < 0:
        return False
    file.seek(remaining)
    end = file.read()
    if not end[len(NO_COMMENT) :].startswith(MARK):
        return False
    file.seek(0)
    checksum = hashlib.sha256()
    while remaining > 0 and (block := file.read(min(remaining, BLOCK))):
        checksum.update(block)
        remaining -= len(block)
    checksum.update(NO_COMMENT)
    if _comment(checksum.hexdigest()) != end:
        raise DamagedError("its checksum differs")
    return True
