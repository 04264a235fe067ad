"""The lease of a sweep's folder: one driver works on it, among the machines that share the file system.

A file lock keeps two drivers apart under one kernel, immediately and in every case. It may not reach another machine,
so `lease.json` names the holder, see `sweep.durability.heartbeat`.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from data.atomic import UNFINISHED, create_file, write_file
from sweep.durability.heartbeat import (
    Heartbeat,
    Holder,
    LeaseHeldError,
    LeaseLostError,
    Say,
    held_error,
    wait_for_dead_holder,
)

__all__ = ["FILE", "LOCK", "PATIENCE", "Lease", "LeaseHeldError", "LeaseLostError", "hold"]

FILE, LOCK = "lease.json", ".lock"
BEAT = 5.0  # seconds between heartbeats
PATIENCE = 30.0  # seconds without a heartbeat after which a driver of another machine is dead
SETTLE = 1.0  # seconds after a takeover until it counts
JOIN_SECONDS = 10.0  # for the last heartbeat, which may write to a disk that is away
ABANDONED = 3600.0  # seconds after which an unfinished file will not be finished


class LeaseFile:
    """The file that stores the holder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def read(self) -> Holder | None:
        """Return the holder; None if there is no file, or its content is no lease."""
        try:
            return Holder(**json.loads(self.path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, holder: Holder) -> None:
        """Replace the file."""
        write_file(self.path, json.dumps(asdict(holder)), temporary=self._temporary(holder))

    def create(self, holder: Holder) -> bool:
        """Create the file; of several processes at the same moment, one succeeds."""
        return create_file(self.path, json.dumps(asdict(holder)), temporary=self._temporary(holder))

    def _temporary(self, holder: Holder) -> Path:
        return self.path.with_name(f"{self.path.name}{UNFINISHED}{holder.token}")


class Lease(threading.Thread):
    """A lease that this process holds, and the thread that renews it."""

    def __init__(self, folder: Path, every: float) -> None:
        super().__init__(daemon=True, name="lease")
        self.file, self.every = LeaseFile(folder), every
        self.heartbeat = Heartbeat(self.file, folder)
        self.released = threading.Event()

    def check(self) -> None:
        """Check that the lease is still ours; to be called before each write to the sweep.

        A file system that is away for a moment does not take the lease from its holder.

        Raises:
            LeaseLostError: another process has taken the sweep over.
        """
        with contextlib.suppress(OSError):
            self.heartbeat.check()

    def take(self, dead: Holder | None, settle: float) -> None:
        """Write this process into the lease, in place of a dead holder if there is one.

        Raises:
            LeaseHeldError: another process did so at the same moment.
        """
        if dead is None and self.file.create(self.heartbeat.holder):
            return
        if self.file.read() == dead:  # None: the file is no lease
            self.heartbeat.take_over(settle)
        else:
            self.heartbeat.confirm()

    def run(self) -> None:
        """Renew the lease until it is released or lost."""
        while not self.released.wait(self.every) and not self.heartbeat.lost.is_set():
            with contextlib.suppress(OSError, LeaseLostError):
                self.heartbeat.beat()

    def release(self) -> None:
        """Stop renewing the lease and let the next driver in."""
        self.released.set()
        if self.is_alive():
            self.join(JOIN_SECONDS)
        with contextlib.suppress(OSError, LeaseLostError):
            self.heartbeat.check()
            self.file.path.unlink()


@contextlib.contextmanager
def hold(
    folder: Path,
    beat: float = BEAT,
    patience: float = PATIENCE,
    settle: float = SETTLE,
    say: Say = lambda line: None,
) -> Iterator[Lease]:
    """Hold the sweep's folder while the block runs; see `wait_for_dead_holder` for the timing.

    Args:
        folder: of the sweep; created if it does not exist.
        beat: seconds between heartbeats.
        patience: seconds without a heartbeat after which a driver of another machine is dead.
        settle: seconds after a takeover until it counts.
        say: shows a line to the user when there is something to wait for.

    Raises:
        LeaseHeldError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, lock = LeaseFile(folder), FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise held_error(folder, file.read()) from None
    try:
        dead = wait_for_dead_holder(file, folder, patience, min(beat, patience) / 5, say)
        lease = Lease(folder, beat)
        lease.take(dead, settle)
        lease.start()
        # Remove what killed processes were writing. A young file may belong to a process that asks for the lease now.
        for path in folder.glob(f"*{UNFINISHED}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        try:
            yield lease
        finally:
            lease.release()
    finally:
        lock.release()
