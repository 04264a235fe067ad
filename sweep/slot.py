"""Warm slots: a Tune actor keeps one group of Ray Train workers alive and feeds it trial after trial.

    Tune  ── reset_config ──►  Slot ── assign ──►  Mailbox  ── next ──►  Train workers: fit(job, report)
    Tune  ◄── step ──────────  Slot ◄── take ────  Mailbox  ◄─ report ─  (waits until Tune has decided)

Starting a TorchTrainer for every trial costs some 20 s and 24 CPU-seconds; the second and later trials of a slot cost
about half a second. Reports go in lock step, so a pruned trial stops in every worker at the same epoch.
"""

import importlib
import threading
import uuid
from typing import Any

import ray
import ray.train
import ray.tune

from data.errors import UserError, reason
from sweep.mailbox import Mailbox


class Stopped(Exception):  # noqa: N818 — not an error
    """The trial was ended from outside: unwind `fit` and take the next one."""


def serve(slot: dict[str, Any]) -> None:
    """Train loop of every worker of a slot: one trial after another in the same process, over the same base weights."""
    mailbox, context, seen = slot["mailbox"], ray.train.get_context(), 0
    rank, alone = context.get_world_rank(), context.get_world_size() == 1
    while (current := ray.get(mailbox.next.remote(seen, rank))) is not None:
        seen, job = current

        def report(step: int, metrics: dict[str, Any], version: int = seen) -> None:
            if not ray.get(mailbox.report.remote(version, step, metrics if rank == 0 else None)):
                raise Stopped

        try:
            # Imported here and not by the processes around the workers, which need no torch.
            module, name = slot["fit"].split(":")
            getattr(importlib.import_module(module), name)(job, report)
            if rank == 0:
                ray.get(mailbox.done.remote(seen))
        except Stopped:
            pass
        except Exception as error:
            cause = getattr(error, "cause", None) or error  # Ray wraps what a read task raised
            if isinstance(cause, UserError):
                ray.get(mailbox.fail.remote(seen, str(cause), final=True))
                if alone or cause.in_every_worker:
                    continue
                raise  # the other workers still wait for this one: only a new group gets them out
            lost = isinstance(error, ray.exceptions.RayError)  # infrastructure: worth another start
            why = f"{type(cause).__name__}: {reason(cause)}"
            ray.get(mailbox.fail.remote(seen, why, final=alone and not lost))
            raise


class Slot(ray.tune.Trainable):
    """A Tune trainable whose actor owns a mailbox and, in a thread, one long TorchTrainer run.

    Run it with `reuse_actors=True` and resources {"CPU": 0, "memory": 1}: the workers hold the real ones.
    """

    fit: str
    scaling: dict[str, Any]
    storage: str

    def setup(self, config: dict[str, Any]) -> None:
        self.error: BaseException | None = None
        self.mailbox = Mailbox.remote()  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self._hold, daemon=True)
        self.thread.start()
        self.reset_config(config)

    def _hold(self) -> None:
        from ray.train.torch import TorchTrainer

        try:
            TorchTrainer(
                serve,
                train_loop_config={"mailbox": self.mailbox, "fit": self.fit},
                scaling_config=ray.train.ScalingConfig(**self.scaling),
                run_config=ray.train.RunConfig(
                    name=f"slot-{uuid.uuid4().hex[:8]}",
                    storage_path=self.storage,
                    failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=3),
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


def slot_class(fit: str, scaling: dict[str, Any], storage: str) -> type[Slot]:
    """A slot whose workers run a function.

    Args:
        fit: "module:function", called with a job and `report(epoch, metrics)`.
        scaling: arguments of `ray.train.ScalingConfig`.
        storage: folder for Ray Train's own state.
    """
    return type("Slot", (Slot,), {"fit": fit, "scaling": scaling, "storage": storage})
