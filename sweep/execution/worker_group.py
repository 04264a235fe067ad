"""Warm slots: a Tune actor keeps one group of Ray Train workers alive and feeds it trial after trial.

    Tune  ── reset_config ──►  Slot ── assign ──►  Mailbox  ── next ──►  Train workers: fit(job, report, interrupted)
    Tune  ◄── step ──────────  Slot ◄── take ────  Mailbox  ◄─ report ─  (waits until Tune has decided)

Starting a TorchTrainer for every trial costs some 20 s and 24 CPU-seconds; the second and later trials of a slot cost
about half a second. Reports go in lock step, so a pruned trial stops in every worker at the same epoch.
"""

import contextlib
import importlib
import threading
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.tune

from data.errors import UserError, reason
from model.checkpoints.fencing import StaleAttemptError
from sweep.compat import draining_nodes
from sweep.execution.mailbox import Mailbox

DRAIN_CHECK = 3.0  # seconds between two looks at whether this node is to go away


class TrialStopped(Exception):  # noqa: N818 — not an error
    """The trial was ended from outside: unwind `fit` and take the next one."""


class NodeDrainingError(Exception):
    """This node goes away: the trial has its checkpoint and goes on elsewhere."""


def serve(slot: dict[str, Any]) -> None:
    """Train loop of every worker of a slot: one trial after another in the same process, over the same base weights."""
    mailbox, context, seen = slot["mailbox"], ray.train.get_context(), 0
    # Imported here and not by the processes around the workers, which need no torch.
    module, name = slot["fit"].split(":")
    fit = getattr(importlib.import_module(module), name)
    rank, alone = context.get_world_rank(), context.get_world_size() == 1
    interrupted = watch(mailbox)
    while (current := ray.get(mailbox.next.remote(seen, rank))) is not None:
        seen, job = current

        def report(step: int, metrics: dict[str, Any], version: int = seen) -> None:
            if not ray.get(mailbox.report.remote(version, step, metrics if rank == 0 else None)):
                raise TrialStopped

        try:
            finished = fit(job, report, interrupted)
            if finished and rank == 0:
                ray.get(mailbox.done.remote(seen))
            if not finished and not ray.get(mailbox.interrupted.remote(seen)):
                raise NodeDrainingError("this node is to be drained")
        except TrialStopped:
            pass
        except StaleAttemptError:
            return  # this process was given up for lost, and the trial goes on elsewhere
        except NodeDrainingError:
            raise  # Train starts the group again, on nodes that stay
        except Exception as error:
            if _is_last_word(mailbox, seen, error, alone):
                continue
            raise


def _is_last_word(mailbox: Any, version: int, error: Exception, alone: bool) -> bool:
    """Tell why a trial failed; whether this worker can go on with the next one."""
    cause = getattr(error, "cause", None) or error  # Ray wraps what a read task raised
    if isinstance(cause, UserError):
        told = mailbox.fail.remote(version, str(cause), final=True, reason=cause.reason, common=cause.common)
        ray.get(told)
        # The other workers still wait for one that alone raised: only a new group gets them out.
        return alone or cause.in_every_worker
    lost = isinstance(error, ray.exceptions.RayError)  # infrastructure: worth another start
    ray.get(mailbox.fail.remote(version, f"{type(cause).__name__}: {reason(cause)}", final=alone and not lost))
    return False


def watch(mailbox: Any) -> Callable[[], bool]:
    """Look out, in threads, for the end of the sweep and of this node.

    Returns:
        Whether a trial is to write a checkpoint and end; free to call.
    """
    flag, node = threading.Event(), ray.get_runtime_context().get_node_id()

    def stop() -> None:
        try:
            ray.get(mailbox.stopped.remote())
            flag.set()
        except ray.exceptions.RayError:
            return  # the slot is gone, and this worker with it

    def drain() -> None:
        while not flag.wait(DRAIN_CHECK):
            with contextlib.suppress(Exception):  # a control plane that is away for a moment
                if node in draining_nodes():
                    flag.set()

    for work in (stop, drain):
        threading.Thread(target=work, daemon=True, name=f"watch-{work.__name__}").start()
    return flag.is_set


class WorkerGroup(ray.tune.Trainable):
    """A Tune trainable whose actor owns a mailbox and, in a thread, one long TorchTrainer run.

    Run it with `reuse_actors=True` and resources {"CPU": 0, "memory": 1}: the workers hold the real ones.
    """

    fit: str
    scaling: dict[str, Any]
    storage: str
    notice: Any

    def setup(self, config: dict[str, Any]) -> None:
        self.error: BaseException | None = None
        self.mailbox = Mailbox.remote()  # type: ignore[attr-defined]
        self.noticed = self.notice.wait.remote()
        self.thread = threading.Thread(target=self._hold, daemon=True)
        self.thread.start()
        self.reset_config(config)

    def _hold(self) -> None:
        try:
            trainer_class(self.scaling["num_workers"])(
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
        waited = [reference, self.noticed] if self.noticed else [reference]
        while reference not in ray.wait(waited, timeout=1)[0]:
            if self.noticed and ray.wait([self.noticed], timeout=0)[0]:
                ray.get(self.mailbox.stop.remote())
                self.noticed, waited = None, [reference]
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


def trainer_class(workers: int) -> type[Any]:
    """Ray Train's trainer, with no more around the workers than a slot uses: each process costs its start.

    A single worker joins no process group, so neither the Tune actor nor the controller imports torch; and datasets,
    which a trial opens for itself, have no manager.
    """
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    base = DataParallelTrainer
    if workers > 1:
        from ray.train.torch import TorchTrainer

        base = TorchTrainer

    class GroupTrainer(base):  # type: ignore[misc, valid-type]
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]

    return GroupTrainer


def worker_group_class(fit: str, scaling: dict[str, Any], storage: str, notice: Any) -> type[WorkerGroup]:
    """A slot whose workers run a function.

    Args:
        fit: "module:function", called with a job, `report(epoch, metrics)` and `interrupted()`; it returns whether the
            trial came to its end.
        scaling: arguments of `ray.train.ScalingConfig`.
        storage: folder for Ray Train's own state.
        notice: the sweep's `StopEvent`.
    """
    return type("Slot", (WorkerGroup,), {"fit": fit, "scaling": scaling, "storage": storage, "notice": notice})
