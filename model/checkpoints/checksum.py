"""Files of tensors and plain values with a checksum: damage to any of their bytes is noticed when they are read.

torch writes a zip archive, whose own checksums it does not verify when it reads. So the archive gets a comment, which
other readers pass over: the sha256 of the archive without it.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

SEAL = b"sha256:"
LENGTH = len(SEAL) + 64
NO_COMMENT = b"\0\0"  # the last bytes of an archive without a comment: its length
BLOCK = 2**20


class DamagedError(Exception):
    """The file is not what was written; says in a word what is wrong."""


class _Stream:
    """What torch writes to."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.checksum = file, hashlib.sha256()
        self.error: OSError | None = None  # torch would tell its own

    def write(self, content: bytes) -> int:
        try:
            written = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.checksum.update(content)
        return written

    def flush(self) -> None:
        """Asked for by torch, before the file is whole."""


def write(path: Path, content: Any) -> None:
    """Write a new file, down to the disk.

    Raises:
        OSError: as the system says it.
    """
    with path.open("wb") as file:
        stream = _Stream(file)
        try:
            torch.save(content, stream)  # type: ignore[arg-type]  # needs no more than `write`
        except Exception as error:
            raise stream.error or error from None
        file.seek(-len(NO_COMMENT), os.SEEK_END)
        file.write(_end(stream.checksum.hexdigest()))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[Any, bool]:
    """What a file holds, tensors and plain values only, never code; and whether it has the checksum.

    Raises:
        DamagedError: the checksum is not that of the content, or torch cannot read it.
        OSError: the file cannot be read, whatever it holds.
    """
    with path.open("rb") as file:
        sealed = _is_sealed(file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True), sealed
        except Exception as error:
            raise DamagedError(type(error).__name__) from None  # its text advises to load without the safeguards


def _end(checksum: str) -> bytes:
    """The comment, after its length."""
    return LENGTH.to_bytes(2, "little") + SEAL + checksum.encode()


def _is_sealed(file: BinaryIO) -> bool:
    left = file.seek(0, os.SEEK_END) - LENGTH - len(NO_COMMENT)
    if left < 0:
        return False
    file.seek(left)
    end = file.read()
    if not end[len(NO_COMMENT) :].startswith(SEAL):
        return False
    file.seek(0)
    checksum = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, BLOCK))):
        checksum.update(block)
        left -= len(block)
    checksum.update(NO_COMMENT)
    if _end(checksum.hexdigest()) != end:
        raise DamagedError("its checksum differs")
    return True
