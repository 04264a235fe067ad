"""The mailbox of a slot: trials go down to its workers, reports come up, in lock step with Tune's decisions."""

import asyncio
import collections
import ctypes
import json
import signal
from typing import Any

import ray

Job = dict[str, Any]
RETRIES = 3  # times in a row that a trial is started again inside its slot, without a new epoch in between


def end_on_term() -> None:
    """Let SIGTERM end this actor at once: Ray would first wait for the calls in flight, and those here wait for ever.

    The C library's call, since Python's works in the main thread only.
    """
    if ray.is_initialized():  # within an actor
        ctypes.CDLL(None).signal(int(signal.SIGTERM), None)


@ray.remote(num_cpus=0)
class StopEvent:
    """Tells everybody who asks that the sweep is to stop, once it is."""

    def __init__(self) -> None:
        end_on_term()
        self.given = asyncio.Event()

    async def give(self) -> None:
        """The sweep is to stop."""
        self.given.set()

    async def wait(self) -> None:
        """Return when the sweep is to stop."""
        await self.given.wait()


@ray.remote(num_cpus=0)
class Mailbox:
    """Down: the current trial. Up: its reports, each returned only once Tune has decided.

    Steps grow strictly within a trial, so a worker that was restarted may repeat what it has said already.
    """

    def __init__(self) -> None:
        end_on_term()
        self.version = self.over = 0  # the current trial; the last one that ended in the workers
        self.job: Job | None = None
        self.closed = self.stopping = False
        self.changed = asyncio.Condition()
        self._reset()

    def _reset(self) -> None:
        self.starts, self.note = 0, ""
        self.out: collections.deque[tuple[float, dict[str, Any]]] = collections.deque()
        self.queued = self.handed = self.approved = -1.0  # steps

    async def assign(self, job: Job) -> int:
        """Start a trial; whatever still runs of the former one is told to stop."""
        async with self.changed:
            self.version, self.job = self.version + 1, job
            self._reset()
            self._leave_if_idle()
            self.changed.notify_all()
            return self.version

    async def close(self) -> None:
        """Let the workers end."""
        async with self.changed:
            self.version, self.closed = self.version + 1, True
            self.changed.notify_all()

    async def next(self, seen: int, rank: int) -> tuple[int, Job] | None:
        """The trial after number `seen` (0: whichever is current), or None when the slot closes."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.closed or self.version > max(seen, self.over))
            if self.closed:
                return None
            if rank == 0:
                self.starts += 1
                if self.starts > 1 + RETRIES:
                    self._give_up(self.note or "its workers died too often", "workers lost")
                    raise RuntimeError(self.note or "its workers died too often")
            assert self.job is not None
            return self.version, self.job

    async def report(self, version: int, step: int, metrics: dict[str, Any] | None) -> bool:
        """True: go on. False: the trial is over. Ranks other than 0 send no metrics and only wait."""
        async with self.changed:
            if version == self.version and metrics is not None and step > self.queued:
                # Tune flattens nested dictionaries, so the metrics travel as one string.
                self._push(step, {"epoch": step, "metrics": json.dumps(metrics)})
                self.starts = 1
            await self.changed.wait_for(lambda: version != self.version or self.approved >= step)
            return version == self.version

    async def done(self, version: int) -> None:
        """The trial trained to its end."""
        async with self.changed:
            if version == self.version:
                self._push(float("inf"), {"finished": True, "done": True})

    async def fail(self, version: int, why: str, final: bool, reason: str = "error", common: bool = False) -> None:
        """An exception in `fit`. With several workers it may only mean that a peer died: Train restarts the group.

        Args:
            version: of the trial.
            why: in words.
            final: whether another start would fail alike.
            reason: in a word.
            common: whether every trial would fail alike.
        """
        async with self.changed:
            if version == self.version > self.over:
                self.note = why
                if final:
                    self._give_up(why, reason, common)

    async def stop(self) -> None:
        """The sweep is to stop: the trial that runs writes a checkpoint and ends."""
        async with self.changed:
            self.stopping = True
            self._leave_if_idle()
            self.changed.notify_all()

    async def stopped(self) -> None:
        """Return when the sweep is to stop."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.stopping or self.closed)

    async def interrupted(self, version: int) -> bool:
        """The trial has written a checkpoint and ended before its time.

        Returns:
            Whether that was for the sweep's sake. Otherwise its node goes away, which does not count as a failure.
        """
        async with self.changed:
            if self.stopping:
                self._leave(version)
            else:
                self.starts = 0
            return self.stopping or self.closed

    async def take(self, version: int) -> dict[str, Any]:
        """The next report. Asking for it approves all that were handed out before."""
        async with self.changed:
            self.approved = self.handed
            self.changed.notify_all()
            await self.changed.wait_for(lambda: bool(self.out) or version != self.version)
            if version != self.version:
                raise RuntimeError("the slot moved on to another trial")
            self.handed, metrics = self.out.popleft()
            return metrics

    def _leave_if_idle(self) -> None:
        if self.stopping and self.starts == 0:
            self._leave(self.version)

    def _leave(self, version: int) -> None:
        if version == self.version > self.over:
            self.over = version
            self._push(float("inf"), {"interrupted": True, "done": True})

    def _give_up(self, why: str, reason: str, common: bool = False) -> None:
        self.over = self.version
        self._push(float("inf"), {"failed": why, "reason": reason, "common": common, "done": True})

    def _push(self, step: float, metrics: dict[str, Any]) -> None:
        self.queued = step
        self.out.append((step, metrics))
        self.changed.notify_all()
