"""Attempts at a trial: who began last may write into its folder, and what still runs of those before may not.

A worker may go on for seconds after its node was given up for lost, while the trial has begun again elsewhere.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from data.atomic import UNFINISHED, commit, removed_afterwards
from data.errors import StorageError, storing

LOCK = ".lock"
PREFIX = "attempt-"
WRITTEN = ("checkpoint", "predictions.json", "token_budget")  # how the names of such files begin
PATIENCE = 60.0  # seconds for which another's lock is waited for: nobody holds it for longer than a rename


class StaleAttemptError(Exception):
    """A later attempt at the trial has begun: this one must write nothing any more."""


class TrialLock:
    """The right to write into a trial's folder, until somebody else claims it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number

    @classmethod
    def claim(cls, folder: Path) -> "TrialLock":
        """Begin the next attempt; what former ones have not finished writing is removed.

        Raises:
            StorageError: the folder cannot be written.
        """
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                known = _numbers(folder)
                number = max(known, default=0) + 1
                (folder / _name(number)).touch(exist_ok=False)
                for former in known:  # only now: a kill in between leaves two, of which the newer one counts
                    (folder / _name(former)).unlink()
                for path in folder.glob(f"*{UNFINISHED}*"):
                    if path.name.startswith(WRITTEN):
                        path.unlink()
        return cls(folder, number)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder, for a moment, to change a file in it.

        Raises:
            Superseded: a later attempt has begun.
            StorageError: in place of an OSError within.
        """
        with storing(self.folder), _locked(self.folder):
            self.check()
            yield

    def check(self) -> None:
        """Raise Superseded where a later attempt has begun already."""
        with storing(self.folder):
            newest = max(_numbers(self.folder), default=0)
        if newest != self.number:
            raise StaleAttemptError(f"{self.folder}: attempt {self.number} is over, number {newest} has begun")

    def unfinished(self, name: str) -> Path:
        """The name under which a file is written; no two attempts share it."""
        return self.folder / f"{name}{UNFINISHED}{self.number:04d}"

    def replace(self, name: str, content: str) -> None:
        """Write or replace a small file in one move.

        Raises:
            Superseded, StorageError: as `writing`.
        """
        with storing(self.folder / name), removed_afterwards(self.unfinished(name)) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
            with self.writing():
                commit(unfinished, self.folder / name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise StorageError(
            f"{folder / LOCK}: held by another process for {PATIENCE:.0f} s; end it and give the same command again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _name(number: int) -> str:
    return f"{PREFIX}{number:04d}"


def _numbers(folder: Path) -> list[int]:
    """Of the attempts that have left a file: one, or two after a kill."""
    return [int(path.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}*")]
