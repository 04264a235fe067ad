"""What processes of a sweep tell each other: the mailbox of a worker group, and what the driver tells all groups.

Trials go through the mailbox to the workers, and reports come back, in lockstep with Tune's decisions. What the driver
says is kept by Ray's control plane, which needs no process for it.
"""

import asyncio
import collections
import contextlib
import ctypes
import json
import signal
import threading
import uuid
from typing import NamedTuple

import ray

from sweep.compat import forget_value, read_value, store_value
from sweep.execution.job import RETRIES, FitReport, Task, TrialJob
from sweep.execution.waiting import Work

END = float("inf")  # the step of the last report of a trial


class QueuedReport(NamedTuple):
    """A report on its way to Tune."""

    step: float
    content: FitReport


def end_on_term() -> None:
    """Let SIGTERM end this actor at once: Ray would first wait for pending calls, which never return here.

    The handler is set through the C library, since Python sets handlers in the main thread only.
    """
    if ray.is_initialized():  # within an actor
        ctypes.CDLL(None).signal(int(signal.SIGTERM), None)


class Events(NamedTuple):
    """What the driver has said."""

    stopping: bool = False  # the sweep is asked to stop
    version: int = 0  # of the queue of tasks and trials; it increases


class DriverEvents:
    """Tells every worker group when the sweep is asked to stop, and when there may be something to do again.

    Calls return at once, also where the control plane does not answer.

    Attributes:
        key: of the store, which worker groups need.
    """

    def __init__(self) -> None:
        self.key = f"sweep-events-{uuid.uuid4().hex}"
        self._events = Events()
        self._changing, self._writing = threading.Lock(), threading.Lock()

    def stop(self) -> None:
        """Ask the sweep to stop."""
        with self._changing:
            self._events = self._events._replace(stopping=True)
        Work(self._write, "events")

    def announce(self, version: int) -> None:
        """Tell worker groups on standby that the queue of tasks and trials has changed."""
        with self._changing:
            self._events = self._events._replace(version=max(version, self._events.version))
        Work(self._write, "events")

    def close(self) -> None:
        """Remove what was said from the store."""
        Work(lambda: forget_value(self.key), "events")

    def _write(self) -> None:
        with self._writing:
            store_value(self.key, json.dumps(self._events).encode())


def read_events(key: str) -> Events:
    """Return what the driver has said; nothing where the control plane is away for a moment."""
    with contextlib.suppress(Exception):
        if (content := read_value(key)) is not None:
            return Events(*json.loads(content))
    return Events()


@ray.remote(num_cpus=0)
class Mailbox:
    """Passes the current trial or task down to the workers, and each report up, which returns once Tune has decided.

    Steps increase strictly within a trial, so a restarted worker may repeat its reports.
    """

    def __init__(self) -> None:
        end_on_term()
        self.version = self.over = 0  # the current job; the last one that ended in the workers
        self.job: TrialJob | Task | None = None
        self.closed = self.stopping = False
        self.changed = asyncio.Condition()
        self._reset()

    def _reset(self) -> None:
        self.starts, self.note = 0, ""
        self.out: collections.deque[QueuedReport] = collections.deque()
        self.queued = self.handed = self.approved = -1.0  # steps
        self.shares: dict[int, list[str]] = {}  # results of a task by rank

    async def assign(self, job: TrialJob | Task) -> int:
        """Start a job and stop what still runs of the previous one; return its version."""
        async with self.changed:
            self.version, self.job = self.version + 1, job
            self._reset()
            self._interrupt_if_idle()
            self.changed.notify_all()
            return self.version

    async def close(self) -> None:
        """Let the workers end."""
        async with self.changed:
            self.version, self.closed = self.version + 1, True
            self.changed.notify_all()

    async def next(self, seen: int, rank: int) -> tuple[int, TrialJob | Task] | None:
        """Return the job after version `seen` (0: the current one), or None when the worker group closes."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.closed or self.version > max(seen, self.over))
            if self.closed:
                return None
            if rank == 0:
                self.starts += 1
                if self.starts > 1 + (self.job.restarts if isinstance(self.job, Task) else RETRIES):
                    self._give_up(self.note or "its workers died too often", "workers lost")
                    raise RuntimeError(self.note or "its workers died too often")
            assert self.job is not None
            return self.version, self.job

    async def report(self, version: int, step: int, metrics: dict[str, float] | None) -> bool:
        """Return whether the trial continues. Ranks other than 0 send no metrics and only wait."""
        async with self.changed:
            if version == self.version and metrics is not None and step > self.queued:
                # Tune flattens nested dictionaries, so the metrics travel as one string.
                self._push(step, {"epoch": step, "metrics": json.dumps(metrics)})
                self.starts = 1
            await self.changed.wait_for(lambda: version != self.version or self.approved >= step)
            return version == self.version

    async def done(self, version: int) -> None:
        """Report that the trial trained to its end."""
        async with self.changed:
            if version == self.version:
                self._push(END, {"finished": True, "done": True})

    async def deliver(self, version: int, rank: int, workers: int, results: list[str]) -> None:
        """Report a worker's share of a task: every `workers`-th result, from that at `rank` on."""
        async with self.changed:
            self.shares[rank] = results
            if version == self.version > self.over and len(self.shares) == workers:
                merged = [""] * sum(map(len, self.shares.values()))
                for first, share in self.shares.items():
                    merged[first::workers] = share
                self._push(END, {"finished": True, "results": merged, "done": True})

    async def fail(
        self,
        version: int,
        why: str,
        final: bool,
        reason: str = "error",
        common: bool = False,
        outside: bool | None = None,
    ) -> None:
        """Report an exception in `fit`. With several workers it may only mean that a peer died: Train restarts them.

        Args:
            version: of the trial.
            why: message for people.
            final: whether another start would fail alike.
            reason: kind of failure.
            common: whether every trial would fail alike.
            outside: whether the cause is outside the trial's configuration; None: the reason decides.
        """
        async with self.changed:
            if version == self.version > self.over:
                self.note = why
                if final:
                    self._give_up(why, reason, common, outside)

    async def stop(self) -> None:
        """Ask the running trial to write a checkpoint and end; a task has nothing to write."""
        async with self.changed:
            self.stopping = True
            self._interrupt_if_idle()
            self.changed.notify_all()

    async def stopped(self) -> None:
        """Return when the sweep is asked to stop."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.stopping or self.closed)

    async def interrupted(self, version: int) -> bool:
        """Report that the trial has written a checkpoint and ended early.

        Returns:
            Whether the sweep stops. Otherwise the node of a worker leaves, which does not count as a failure.
        """
        async with self.changed:
            if self.stopping:
                self._interrupt(version)
            else:
                self.starts = 0
            return self.stopping or self.closed

    async def take(self, version: int) -> FitReport:
        """Return the next report; asking for it approves all reports that were handed out before."""
        async with self.changed:
            self.approved = self.handed
            self.changed.notify_all()
            await self.changed.wait_for(lambda: bool(self.out) or version != self.version)
            if version != self.version:
                raise RuntimeError("the worker group runs another trial now")
            self.handed, content = self.out.popleft()
            return content

    def _interrupt_if_idle(self) -> None:
        if self.stopping and (self.starts == 0 or isinstance(self.job, Task)):
            self._interrupt(self.version)

    def _interrupt(self, version: int) -> None:
        if version == self.version > self.over:
            self.over = version
            self._push(END, {"interrupted": True, "done": True})

    def _give_up(self, why: str, reason: str, common: bool = False, outside: bool | None = None) -> None:
        self.over = self.version
        ended: FitReport = {"failed": why, "reason": reason, "common": common, "done": True}
        self._push(END, ended if outside is None else {**ended, "outside": outside})

    def _push(self, step: float, content: FitReport) -> None:
        self.queued = step
        self.out.append(QueuedReport(step, content))
        self.changed.notify_all()
