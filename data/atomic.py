"""Atomic writes: a file or folder is complete under its name, or it is not there.

No other module of the three packages writes a file and renames it.

Everything is first written under a temporary name on the same file system. A process that is killed leaves at most a
file of such a name, which contains UNFINISHED.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError, storing

UNFINISHED = ".unfinished-"


def write_file(
    path: Path, content: str | bytes | memoryview, *, temporary: Path | None = None, durable: bool = False
) -> None:
    """Write or replace a file.

    Args:
        path: the file.
        content: its bytes, or its text, which is encoded as UTF-8.
        temporary: the name to write under first, for a file that several processes may write at the same moment. By
            default this process is the only writer, and what killed ones left behind is removed.
        durable: flush file and folder to disk, so that the file survives a power failure.
    """
    if temporary is None:
        for leftover in path.parent.glob(f"{path.name}{UNFINISHED}*"):
            leftover.unlink(missing_ok=True)
    with removed_afterwards(temporary or path.with_name(f"{path.name}{UNFINISHED}{os.getpid()}")) as unfinished:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        commit(unfinished, path, durable=durable)


def create_file(path: Path, content: str, *, temporary: Path, mode: int = 0o666) -> bool:
    """Write a file unless it exists; of several processes at the same moment, one succeeds.

    Args:
        path: the file.
        content: its text.
        temporary: the name to write under first, which no other process uses.
        mode: access rights, before the umask is applied.

    Returns:
        Whether this call wrote the file.
    """
    with removed_afterwards(temporary) as unfinished:
        unfinished.touch(mode, exist_ok=False)
        unfinished.write_text(content)
        try:
            path.hardlink_to(unfinished)  # unlike a rename, a link does not replace the file of a faster process
        except FileExistsError:
            return False
        except OSError:  # the file system has no hard links
            commit(unfinished, path)
    return True


@contextlib.contextmanager
def removed_afterwards(temporary: Path) -> Iterator[Path]:
    """Yield a temporary path, and remove its file at the end of the block if it was not renamed."""
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def commit(temporary: Path, path: Path, *, durable: bool = False) -> None:
    """Rename a temporary file that is complete.

    Args:
        temporary: its name so far.
        path: its name from now on; a file that has it already is replaced.
        durable: flush the folder to disk, so that the new name survives a power failure. The content survives only if
            the caller has flushed the file.
    """
    temporary.replace(path)
    if durable:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_existing(out: Path) -> None:
    """Raise a UserError if there is a file or folder of this name."""
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; choose another name, or remove it")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` to write into, and rename it to `out` at the end of the block.

    Raises:
        UserError: `out` exists.
        StorageError: in place of an OSError, also of one inside the block.
    """
    refuse_existing(out)
    with storing(out), _unfinished_folder(out) as unfinished:
        yield unfinished
        unfinished.rename(out)


@contextlib.contextmanager
def shared_folder(out: Path) -> Iterator[Path]:
    """Do the same as `new_folder`, but keep an `out` of the same content that another process finishes first."""
    with _unfinished_folder(out) as unfinished:
        yield unfinished
        if not out.exists():
            unfinished.rename(out)


@contextlib.contextmanager
def _unfinished_folder(out: Path) -> Iterator[Path]:
    unfinished = out.with_name(f".{out.name}{UNFINISHED}{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
