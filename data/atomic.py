"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError, storing


def write_file(path: Path, content: str | bytes) -> None:
    """Write or replace a file in one move; what a killed process left of it is removed."""
    for leftover in path.parent.glob(f"{path.name}.unfinished*"):
        leftover.unlink(missing_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)


def refuse_taken(out: Path) -> None:
    """Raise a UserError where there is something already."""
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; choose another name, or remove it")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which gets the name `out` when all of it is there.

    Raises:
        UserError: `out` exists.
        StorageError: in place of an OSError, also within.
    """
    refuse_taken(out)
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        with storing(out):
            unfinished.mkdir(parents=True)
            yield unfinished
            unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
