"""The heartbeat of the process that holds a sweep, and how another process takes over from a dead one.

A record names the holder: `lease.json` in the sweep's folder, `owner.json` in the store of its mirror. The holder
raises the record's counter while it lives. Clocks of different machines are never compared: a process that wants to
take over watches the counter for a while by its own clock.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Say = Callable[[str], None]


class LeaseHeldError(Exception):
    """Another process runs this sweep."""


class LeaseLostError(Exception):
    """Another process took this sweep over: this one must not write to it any more."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a sweep, as the record stores it."""

    token: str  # unique to this hold
    host: str
    boot: str  # id of the kernel's run: one machine, since it was started
    pid: int
    started: float  # of the process, by the clock of its machine; pids are used again
    since: float  # of the hold, by the clock of its machine; shown, never compared with a limit
    beat: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
        """Return a new hold of this process."""
        started = psutil.Process().create_time()
        return cls(uuid.uuid4().hex, socket.gethostname(), boot_id(), os.getpid(), started, time.time())

    @property
    def is_local(self) -> bool:
        """Whether this machine can see the process; a container of another name has pids of its own."""
        return (self.boot, self.host) == (boot_id(), socket.gethostname())

    def is_running(self) -> bool:
        """Return whether a local process still runs; a new process may have got its pid by now."""
        try:
            process = psutil.Process(self.pid)
            same = bool(abs(process.create_time() - self.started) < 1.0)
            return same and bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        minutes = max(0.0, time.time() - self.since) / 60
        return f"host {self.host}, process {self.pid}, for {minutes:.0f} min"


class Record(Protocol):
    """Storage of a holder that every process which may hold the sweep can reach."""

    def read(self) -> Holder | None:
        """Return the holder; None if the sweep was released or never held."""

    def write(self, holder: Holder) -> None:
        """Store the holder."""


class Heartbeat:
    """The hold of this process on a sweep: renewed by `beat`, given up for good once another process took over."""

    def __init__(self, record: Record, folder: Path) -> None:
        self.record, self.folder = record, folder
        self.holder = Holder.this_process()
        self.lost = threading.Event()

    def check(self) -> None:
        """Read the record and raise a LeaseLostError if this process does not hold the sweep any more.

        It had been suspended, or cut off from the storage, for longer than others wait.
        """
        holder = self.record.read() if not self.lost.is_set() else None
        if holder is None or holder.token != self.holder.token:
            self.lost.set()
            by = "" if holder is None else f" ({holder})"
            raise LeaseLostError(
                f"{self.folder}: another process took this sweep over{by}; this process stops writing to it"
            )

    def beat(self) -> None:
        """Raise the counter of the record; see `check`."""
        self.check()
        self.holder = replace(self.holder, beat=self.holder.beat + 1)
        self.record.write(self.holder)

    def take_over(self, settle: float) -> None:
        """Replace a dead holder; of several processes that do so at the same moment, the last one to write wins.

        Args:
            settle: seconds after which every other process that saw the same dead holder has written.

        Raises:
            LeaseHeldError: another process was the last one.
        """
        self.record.write(self.holder)
        time.sleep(settle)
        self.confirm()

    def confirm(self) -> None:
        """Raise a LeaseHeldError unless this process holds the sweep."""
        holder = self.record.read()
        if holder is None or holder.token != self.holder.token:
            raise held_error(self.folder, holder)


def wait_for_dead_holder(record: Record, folder: Path, patience: float, every: float, say: Say) -> Holder | None:
    """Return once no living process holds a sweep: its dead holder, or None if the sweep was released.

    A dead process of this machine counts as dead at once; one of another machine or container, or from before a reboot,
    after `patience` seconds without a heartbeat.

    Args:
        record: of the holder.
        folder: of the sweep, for messages.
        patience: see above, in seconds.
        every: seconds between two looks at the record.
        say: shows a line to the user when there is something to wait for.

    Raises:
        LeaseHeldError: the holder is alive.
    """
    holder = record.read()
    if holder is None:
        return None
    if holder.is_local:
        if holder.pid != os.getpid() and holder.is_running():
            raise held_error(folder, holder)
        return holder
    say(f"this sweep was not released by {holder}; waiting {patience:.0f} s for a heartbeat")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(every)
        current = record.read()
        if current is None:
            return None
        if current != holder:
            raise held_error(folder, current)
    return holder


def held_error(folder: Path, holder: Holder | None) -> LeaseHeldError:
    """Return the error of a sweep that another process holds."""
    by = "" if holder is None else f" ({holder})"
    return LeaseHeldError(f"{folder}: another `sweep run` is working on this sweep{by}; wait for it, or end it first")


def boot_id() -> str:
    """Return the id of the kernel's run: it differs between machines of one name, not between containers of one."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else f"{uuid.getnode()}-{psutil.boot_time():.0f}"
