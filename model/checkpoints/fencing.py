"""The lock on a trial's folder: the attempt that began last may write, and workers of earlier attempts may not.

A worker may run for seconds after its node was declared dead, while the trial has begun again elsewhere. So every
attempt has a number, a fencing token, which every write checks.
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
TIMEOUT = 60.0  # seconds to wait for the lock, which is never held for longer than a rename takes


class StaleAttemptError(Exception):
    """A later attempt at the trial has begun: this one must not write any more."""


class TrialLock:
    """The right to write into a trial's folder, until another attempt claims it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number

    @classmethod
    def claim(cls, folder: Path) -> "TrialLock":
        """Begin the next attempt, and remove the unfinished files of former ones.

        Raises:
            StorageError: the folder cannot be written.
        """
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                former = _attempts(folder)
                number = max(former, default=0) + 1
                (folder / _file(number)).touch(exist_ok=False)
                for attempt in former:  # after the new file: a kill in between leaves two, of which the newer counts
                    (folder / _file(attempt)).unlink()
                for path in folder.glob(f"*{UNFINISHED}*"):
                    if path.name.startswith(WRITTEN):
                        path.unlink()
        return cls(folder, number)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's file lock for a moment, to change a file in it.

        Raises:
            StaleAttemptError: a later attempt has begun.
            StorageError: in place of an OSError within.
        """
        with storing(self.folder), _locked(self.folder):
            self.check()
            yield

    def check(self) -> None:
        """Raise StaleAttemptError if a later attempt has begun."""
        with storing(self.folder):
            newest = max(_attempts(self.folder), default=0)
        if newest != self.number:
            raise StaleAttemptError(f"{self.folder}: attempt {self.number} is superseded by attempt {newest}")

    def unfinished(self, name: str) -> Path:
        """Return the temporary name under which this attempt writes a file; no two attempts share it."""
        return self.folder / f"{name}{UNFINISHED}{self.number:04d}"

    def replace(self, name: str, content: str) -> None:
        """Write or replace a small file atomically.

        Raises:
            StaleAttemptError, StorageError: as `writing`.
        """
        with storing(self.folder / name), removed_afterwards(self.unfinished(name)) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
            with self.writing():
                commit(unfinished, self.folder / name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=TIMEOUT)
    except Timeout:
        raise StorageError(
            f"{folder / LOCK}: held by another process for {TIMEOUT:.0f} s; end it and rerun the same command"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _file(attempt: int) -> str:
    return f"{PREFIX}{attempt:04d}"


def _attempts(folder: Path) -> list[int]:
    """Return the numbers of the attempts that have a file: one, or two after a kill."""
    return [int(path.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}*")]
