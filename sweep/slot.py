"""Warm slots: a Tune actor keeps one group of Ray Train workers alive and feeds it trial after trial.

    Tune  ── reset_config ──►  Slot ── assign ──►  Mailbox  ── next ──►  Train workers: fit(job, report)
    Tune  ◄── step ──────────  Slot ◄── take ────  Mailbox  ◄─ report ─  (waits until Tune has decided)

Starting a TorchTrainer for every trial costs some 20 s and 24 CPU-seconds; the second and later trials of a slot cost
about half a second. Reports go in lock step, so a pruned trial stops in every worker at the same epoch.
"""

import asyncio
import collections
import threading
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.tune
from ray.train.torch import TorchTrainer

from data.errors import UserError

Job = dict[str, Any]
Fit = Callable[[Job, Callable[[int, dict[str, Any]], None]], None]
INFRASTRUCTURE_RETRIES = 2  # times a trial is started again after its workers died


class Stopped(Exception):  # noqa: N818 — not an error
    """The trial was ended from outside: unwind `fit` and take the next one."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Down: the current trial. Up: its reports, each returned only once Tune has decided.

    Steps grow strictly within a trial, so a worker that was restarted may repeat what it has said already.
    """

    def __init__(self) -> None:
        self.version = self.over = 0  # the current trial; the last one that failed for good
        self.job: Job | None = None
        self.closed = False
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
                if self.starts > 1 + INFRASTRUCTURE_RETRIES:
                    self._give_up(self.note or "its workers died too often")
                    raise RuntimeError(self.note or "its workers died too often")
            assert self.job is not None
            return self.version, self.job

    async def report(self, version: int, step: int, metrics: dict[str, Any] | None) -> bool:
        """True: go on. False: the trial is over. Ranks other than 0 send no metrics and only wait."""
        async with self.changed:
            if version == self.version and metrics is not None and step > self.queued:
                self._push(step, {"epoch": step, "metrics": metrics})
            await self.changed.wait_for(lambda: version != self.version or self.approved >= step)
            return version == self.version

    async def done(self, version: int) -> None:
        """The trial trained to its end."""
        async with self.changed:
            if version == self.version:
                self._push(float("inf"), {"finished": True, "done": True})

    async def fail(self, version: int, why: str, final: bool) -> None:
        """An exception in `fit`. With several workers it may only mean that a peer died: Train restarts the group."""
        async with self.changed:
            if version == self.version > self.over:
                self.note = why
                if final:
                    self._give_up(why)

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

    def _give_up(self, why: str) -> None:
        self.over = self.version
        self._push(float("inf"), {"failed": why, "done": True})

    def _push(self, step: float, metrics: dict[str, Any]) -> None:
        self.queued = step
        self.out.append((step, metrics))
        self.changed.notify_all()


def serve(slot: dict[str, Any]) -> None:
    """Train loop of every worker of a slot: one trial after another in the same process, over the same base weights."""
    mailbox, fit, context, seen = slot["mailbox"], slot["fit"], ray.train.get_context(), 0
    rank, alone = context.get_world_rank(), context.get_world_size() == 1
    while (current := ray.get(mailbox.next.remote(seen, rank))) is not None:
        seen, job = current

        def report(step: int, metrics: dict[str, Any], version: int = seen) -> None:
            if not ray.get(mailbox.report.remote(version, step, metrics if rank == 0 else None)):
                raise Stopped

        try:
            fit(job, report)
            if rank == 0:
                ray.get(mailbox.done.remote(seen))
        except Stopped:
            pass
        except UserError as error:  # the same in every worker and every attempt: the trial's own fault
            ray.get(mailbox.fail.remote(seen, str(error), final=True))
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            ray.get(mailbox.fail.remote(seen, why, final=alone))
            raise


class Slot(ray.tune.Trainable):
    """A Tune trainable whose actor owns a mailbox and, in a thread, one long TorchTrainer run.

    Run it with `reuse_actors=True` and resources {"CPU": 0, "memory": 1}: the workers hold the real ones.
    """

    fit: Fit
    scaling: dict[str, Any]
    storage: str

    def setup(self, config: dict[str, Any]) -> None:
        self.error: BaseException | None = None
        self.mailbox = Mailbox.remote()  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self._hold, daemon=True)
        self.thread.start()
        self.reset_config(config)

    def _hold(self) -> None:
        try:
            TorchTrainer(
                serve,
                train_loop_config={"mailbox": self.mailbox, "fit": type(self).fit},
                scaling_config=ray.train.ScalingConfig(**self.scaling),
                run_config=ray.train.RunConfig(
                    name=f"slot-{uuid.uuid4().hex[:8]}",
                    storage_path=self.storage,
                    failure_config=ray.train.FailureConfig(max_failures=-1),
                ),
            ).fit()
        except BaseException as error:  # told to Tune by step(): this thread has nobody to raise to
            self.error = error

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.version = ray.get(self.mailbox.assign.remote(new_config["job"]))
        return True

    def step(self) -> dict[str, Any]:
        reference = self.mailbox.take.remote(self.version)
        while not ray.wait([reference], timeout=1)[0]:
            if not self.thread.is_alive():
                raise RuntimeError(f"the slot's worker group is gone: {self.error}") from self.error
        result: dict[str, Any] = ray.get(reference)
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """The trial's own folder holds its state."""

    def cleanup(self) -> None:
        try:
            ray.get(self.mailbox.close.remote(), timeout=5)
        except ray.exceptions.RayError:
            return
        self.thread.join(10)


def slot_class(fit: Fit, scaling: dict[str, Any], storage: str) -> type[Slot]:
    """A slot whose workers run `fit`, with these arguments of `ray.train.ScalingConfig`."""
    return type("Slot", (Slot,), {"fit": staticmethod(fit), "scaling": scaling, "storage": storage})
