"""Who works on a sweep: a lease with a heartbeat, for drivers on one machine or on several that share a file system.

A file lock keeps two drivers apart under one kernel, at once and whatever happens. It may not reach another machine, so
a file says who holds the sweep, and its counter rises while he lives. Nobody's clock is compared with another's: who
wants to take over watches the counter by his own.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from data.atomic import UNFINISHED, create_file, write_file

FILE, LOCK = "lease.json", ".lock"
BEAT = 5.0  # seconds between heartbeats
PATIENCE = 30.0  # seconds without a heartbeat after which a driver of another machine is dead
SETTLE = 1.0  # seconds in which of two that took over at the same moment the first sees that he is not the last
ABANDONED = 3600.0  # seconds after which a file that was being written will not be finished
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Say = Callable[[str], None]


class LeaseHeldError(Exception):
    """Another process runs this sweep."""


class LeaseLostError(Exception):
    """Another process took this sweep over: this one must not write to it any more."""


@dataclass(frozen=True)
class Holder:
    """What the lease says about the driver that holds it."""

    token: str  # of this lease, and no other
    host: str
    boot: str  # of the kernel: one machine, since it was started
    pid: int
    started: float  # of the process, by its machine's clock: pids are used again
    since: float  # when it took the lease, by its machine's clock; shown, never compared with a limit
    beat: int = 0


class Lease:
    """A lease that is held, and renewed by a thread."""

    def __init__(self, folder: Path, holder: Holder, every: float) -> None:
        self.path = folder / FILE
        self.holder = holder
        self.every = every
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    @property
    def lost(self) -> bool:
        """Whether somebody else took over, as far as the last heartbeat saw."""
        return self._lost.is_set()

    def check(self) -> None:
        """Look whether the lease is still ours; to be called before the sweep is written to.

        Raises:
            Lost: it is not: this process had been suspended, or cut off from the file system.
        """
        with contextlib.suppress(OSError):  # a file system that is away for a moment takes no lease from anybody
            other = _read(self.path)
            if other is None or other.token != self.holder.token:
                self._lost.set()
                who = "nobody" if other is None else in_words(other)
                raise LeaseLostError(
                    f"{self.path.parent}: this sweep was taken over ({who}); this process stops writing to it"
                )
        if self.lost:
            raise LeaseLostError(f"{self.path.parent}: this sweep was taken over; this process stops writing to it")

    def start(self) -> None:
        """Begin to renew the lease."""
        self._thread.start()

    def release(self) -> None:
        """Stop renewing it, and let the next one in."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            other = _read(self.path)
            if other is not None and other.token == self.holder.token:
                self.path.unlink()

    def _renew(self) -> None:
        while not self._ended.wait(self.every):
            with contextlib.suppress(OSError, LeaseLostError):
                self.check()
                self.holder = replace(self.holder, beat=self.holder.beat + 1)
                _write(self.path, self.holder)
            if self.lost:
                return


@contextlib.contextmanager
def hold(
    folder: Path, beat: float = BEAT, patience: float = PATIENCE, settle: float = SETTLE, say: Say | None = None
) -> Iterator[Lease]:
    """Hold the sweep's folder while the block runs.

    A driver of this machine that is dead is replaced at once; one of another machine or container, or from before a
    reboot, after `patience` seconds without a heartbeat.

    Args:
        folder: of the sweep; made if it is not there.
        beat: seconds between heartbeats.
        patience: see above.
        settle: seconds after a takeover until it counts.
        say: is told, in a line, that there is something to wait for.

    Raises:
        Busy: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, lock = folder / FILE, FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _busy(folder, _read(path)) from None
    try:
        left = _left_by_the_dead(folder, patience, min(beat, patience) / 5, say)
        lease = Lease(folder, ourselves(), beat)
        _take(folder, lease.holder, left, settle)
        lease.start()
        _tidy(folder)
        try:
            yield lease
        finally:
            lease.release()
    finally:
        lock.release()


def _tidy(folder: Path) -> None:
    """Remove what killed processes were writing here; what is young may be somebody's who only asks for the lease."""
    for path in folder.glob("*.unfinished*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _left_by_the_dead(folder: Path, patience: float, every: float, say: Say | None) -> str | None:
    """Return when nobody alive holds the lease: what its file says, or None if there is none.

    Raises:
        Busy: somebody holds it.
    """
    path = folder / FILE
    text = _text(path)
    other = parsed(text)
    if other is None:
        return text
    # A container of another name has pids of its own, under the same kernel.
    if (other.boot, other.host) == (boot(), socket.gethostname()):
        if other.pid != os.getpid() and alive(other):
            raise _busy(folder, other)
        return text
    if say is not None:
        say(f"{in_words(other)}: has not given this sweep back; watching for {patience:.0f} s whether it is alive")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(every)
        now = _text(path)
        if now is None:
            return None
        if now != text:
            raise _busy(folder, parsed(now))
    return text


def _take(folder: Path, holder: Holder, left: str | None, settle: float) -> None:
    """Write ourselves into the lease, in place of what a dead driver left there.

    Raises:
        Busy: somebody else did so at the same moment.
    """
    path = folder / FILE
    if left is None:
        if not _create(path, holder):
            raise _busy(folder, _read(path))
        return
    if _text(path) == left:
        _write(path, holder)
        time.sleep(settle)  # others may have found the same at the same moment: the last one to write holds it
    now = _read(path)
    if now is None or now.token != holder.token:
        raise _busy(folder, now)


def _create(path: Path, holder: Holder) -> bool:
    """Make the file if it is not there; of two at the same moment, one succeeds."""
    return create_file(path, json.dumps(asdict(holder)), temporary=_temporary(path, holder))


def _write(path: Path, holder: Holder) -> None:
    write_file(path, json.dumps(asdict(holder)), temporary=_temporary(path, holder))


def _temporary(path: Path, holder: Holder) -> Path:
    return path.with_name(f"{path.name}{UNFINISHED}{holder.token}")


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def parsed(text: str | None) -> Holder | None:
    try:
        content: Any = json.loads(text or "")
        return Holder(**content)
    except (ValueError, TypeError):
        return None


def _read(path: Path) -> Holder | None:
    """Who holds the lease; None if nobody does, or what is there is no lease."""
    return parsed(_text(path))


def ourselves() -> Holder:
    started = psutil.Process().create_time()
    return Holder(uuid.uuid4().hex, socket.gethostname(), boot(), os.getpid(), started, time.time())


def boot() -> str:
    """Names the running kernel: two machines of one name differ in it, two containers of one machine do not."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else f"{uuid.getnode()}-{psutil.boot_time():.0f}"


def alive(holder: Holder) -> bool:
    """Whether the process of a holder under this kernel runs; another one may have its number by now."""
    try:
        process = psutil.Process(holder.pid)
        same = abs(process.create_time() - holder.started) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def in_words(holder: Holder) -> str:
    minutes = max(0.0, time.time() - holder.since) / 60
    return f"host {holder.host}, process {holder.pid}, since {minutes:.0f} min"


def _busy(folder: Path, holder: Holder | None) -> LeaseHeldError:
    who = "" if holder is None else f" ({in_words(holder)})"
    return LeaseHeldError(f"{folder}: another `sweep run` is working on this sweep{who}; wait for it, or end it first")
