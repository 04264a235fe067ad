"""A worker of a group: the process that trains, and does everything else that needs torch.

    Mailbox ── next ──► serve: fit(job, report, interrupted) ── report ──► Mailbox

This module imports neither torch nor Ray Tune: the driver starts workers before it has imported them.
"""

import contextlib
import gc
import importlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypedDict

import ray

from data.errors import UserError, reason
from model.checkpoints.fencing import StaleAttemptError
from sweep.compat import draining_nodes
from sweep.execution.job import Task

if TYPE_CHECKING:
    from ray.actor import ActorHandle

TASK_SECONDS = 300.0  # for the functions of a task to arrive
DRAIN_CHECK = 3.0  # seconds between two looks at whether this node will leave the cluster


class TrialStopped(BaseException):
    """Tune ended the trial: `fit` unwinds, and the worker takes the next one. Not an error, so no handler takes it."""


class NodeDrainingError(Exception):
    """This node will leave the cluster: the trial has its checkpoint and resumes elsewhere."""


class ServeConfig(TypedDict):
    """What the workers of a group receive."""

    mailbox: "ActorHandle"
    fit: str  # "module:function"


def serve(group: ServeConfig, rank: int = 0, workers: int = 1) -> None:
    """Run in every worker of a group: do trials and tasks in this process, one after another, on the same weights."""
    mailbox, seen, fit = group["mailbox"], 0, load_function(group["fit"])
    from model.runtime import memory

    memory.baseline()  # which a dry run reads, perhaps after a trial
    alone, interrupted = workers == 1, watch(mailbox, workers == 1)
    kept: set[int] | None = None  # models from before tasks whose models no trial needs
    while (current := ray.get(mailbox.next.remote(seen, rank))) is not None:
        seen, job = current
        if isinstance(job, Task) and job.temporary:
            kept = memory.cached_models() if kept is None else kept
        elif kept is not None:
            memory.forget_models(kept)
            kept = None

        def report(step: int, metrics: dict[str, float], version: int = seen) -> None:
            if not ray.get(mailbox.report.remote(version, step, metrics if rank == 0 else None)):
                raise TrialStopped

        try:
            if isinstance(job, Task):
                finished = do_task(mailbox, seen, job, rank, workers, interrupted)
            else:
                finished = fit(job, report, interrupted)
                if finished and rank == 0:
                    ray.get(mailbox.done.remote(seen))
            if not finished and not ray.get(mailbox.interrupted.remote(seen)):
                raise NodeDrainingError("this node will leave the cluster")
        except TrialStopped:
            pass
        except StaleAttemptError:
            return  # this process was given up for lost, and the trial continues elsewhere
        except NodeDrainingError:
            raise  # the group restarts on nodes that stay
        except Exception as error:
            if not report_failure(mailbox, seen, error, alone):
                raise


class TrialWorker:
    """The actor of the only worker of a group. It serves one group at a time.

    Args:
        fit: see `ServeConfig`; what it needs is imported at once.
    """

    def __init__(self, fit: str) -> None:
        self.free = threading.Lock()
        load_function(fit)

    def serve(self, group: ServeConfig) -> bool:
        """Serve a group until its mailbox closes; return at once whether this worker was free."""
        if not self.free.acquire(timeout=0):
            return False
        try:
            serve(group)
        finally:
            self.free.release()
        return True


def start_worker(fit: str, resources: Mapping[str, float], restarts: int = 0) -> "ActorHandle":
    """Start the only worker of a group, which ends with this process.

    Args:
        fit: see `ServeConfig`.
        resources: of the worker.
        restarts: how often Ray restarts it when it dies; -1: always.
    """
    actor = ray.remote(TrialWorker).options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy="DEFAULT",  # and not in the place that Tune has reserved for a process
        max_concurrency=2,  # one thread serves a group, and one answers other groups meanwhile
        max_restarts=restarts,
    )
    handle: ActorHandle = actor.remote(fit)
    return handle


def load_function(name: str) -> Callable[..., bool]:
    """Return a function by "module:function"; the processes around the workers, which need no torch, do not call it."""
    module, function = name.split(":")
    loaded: Callable[..., bool] = getattr(importlib.import_module(module), function)
    if not gc.get_freeze_count():  # models, which come later, may become garbage
        gc.freeze()  # what is imported does not, and looking through it takes longest
    return loaded


def do_task(
    mailbox: "ActorHandle", version: int, task: Task, rank: int, workers: int, interrupted: Callable[[], bool]
) -> bool:
    """Do this worker's share of a task, and return whether it was done to its end."""
    results = []
    for call in ray.get(task.calls, timeout=TASK_SECONDS)[rank::workers]:
        if interrupted():
            return False
        results.append(call())
    ray.get(mailbox.deliver.remote(version, rank, workers, results))
    return True


def report_failure(mailbox: "ActorHandle", version: int, error: Exception, alone: bool) -> bool:
    """Report why a trial failed; return whether this worker can continue with the next one."""
    cause = getattr(error, "cause", None) or error  # Ray wraps what a read task raised
    if isinstance(cause, UserError):
        ray.get(
            mailbox.fail.remote(
                version, str(cause), final=True, reason=cause.reason, common=cause.common, outside=cause.outside
            )
        )
        # If only this worker raised, the others still wait for it: only a new group gets them out.
        return alone or cause.in_every_worker
    infrastructure = isinstance(error, ray.exceptions.RayError)  # which another start may find repaired
    why = f"{type(cause).__name__}: {reason(cause)}"
    # Files, connections and drivers may be repaired; any other exception belongs to the configuration, or to the code.
    outside = isinstance(cause, OSError) or "CUDA error" in str(cause)
    ray.get(mailbox.fail.remote(version, why, final=alone and not infrastructure, outside=outside))
    return False


def watch(mailbox: "ActorHandle", alone: bool) -> Callable[[], bool]:
    """Watch, in threads, for the end of the sweep and of this node.

    Args:
        mailbox: of the worker group; when it is lost, so is the group.
        alone: whether this is the only worker, which ends itself then; Ray Train ends others.

    Returns:
        A function that returns whether a trial should write a checkpoint and end; it costs nothing to call.
    """
    flag, node = threading.Event(), ray.get_runtime_context().get_node_id()

    def stop() -> None:
        try:
            ray.get(mailbox.stopped.remote())
            flag.set()
        except ray.exceptions.RayError:
            if alone:
                os._exit(0)

    def drain() -> None:
        while not flag.wait(DRAIN_CHECK):
            with contextlib.suppress(Exception):  # the control plane is away for a moment
                if node in draining_nodes():
                    flag.set()

    for work in (stop, drain):
        threading.Thread(target=work, daemon=True, name=f"watch-{work.__name__}").start()
    return flag.is_set
