"""Worker groups: a Tune actor keeps one group of Ray Train workers running and feeds it trial after trial.

    Tune ── reset_config ──► WorkerGroup ── assign ──► Mailbox ── next ──► workers: fit(job, report, interrupted)
    Tune ◄── step ────────── WorkerGroup ◄── take ──── Mailbox ◄─ report ─ (waits until Tune has decided)

Besides trials, a group does tasks (`sweep.execution.tasks`), and it stands by while there is nothing to do.

A new group for every trial would cost some 20 s and 24 CPU-seconds; the second and later trials of a group cost about
half a second. Reports go in lockstep, so a pruned trial stops in every worker at the same epoch.
"""

import contextlib
import importlib
import threading
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import ray
import ray.train
import ray.tune

from data.errors import UserError, reason
from model.checkpoints.fencing import StaleAttemptError
from sweep.compat import draining_nodes, lean_trainer
from sweep.execution.job import FitReport, Job, Standby, Task
from sweep.execution.mailbox import Mailbox

if TYPE_CHECKING:
    from ray.actor import ActorHandle

MAILBOX_SECONDS = 300.0  # for a mailbox to start and to answer
CLOSE_SECONDS = 5.0  # for a mailbox to close
JOIN_SECONDS = 10.0  # for the workers of a closed mailbox to end; Ray ends the rest
DRAIN_CHECK = 3.0  # seconds between two looks at whether this node will leave the cluster


class TrialStopped(BaseException):
    """Tune ended the trial: `fit` unwinds, and the worker takes the next one. Not an error, so no handler takes it."""


class NodeDrainingError(Exception):
    """This node will leave the cluster: the trial has its checkpoint and resumes elsewhere."""


class Scaling(TypedDict):
    """Arguments of `ray.train.ScalingConfig`."""

    num_workers: int
    use_gpu: bool
    resources_per_worker: dict[str, float]


class ServeConfig(TypedDict):
    """What `serve` receives through Ray Train."""

    mailbox: "ActorHandle"
    fit: str  # "module:function"


def serve(group: ServeConfig) -> None:
    """Run in every worker of a group: do trials and tasks in this process, one after another, on the same weights."""
    mailbox, context, seen = group["mailbox"], ray.train.get_context(), 0
    # Imported here and not by the processes around the workers, which need no torch.
    module, name = group["fit"].split(":")
    fit = getattr(importlib.import_module(module), name)
    from model.runtime import memory

    memory.baseline()  # which a dry run reads, perhaps after a trial
    rank, workers = context.get_world_rank(), context.get_world_size()
    alone, interrupted = workers == 1, watch(mailbox)
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
            raise  # Train restarts the group on nodes that stay
        except Exception as error:
            if not report_failure(mailbox, seen, error, alone):
                raise


def do_task(
    mailbox: "ActorHandle", version: int, task: Task, rank: int, workers: int, interrupted: Callable[[], bool]
) -> bool:
    """Do this worker's share of a task, and return whether it was done to its end."""
    results = []
    for call in ray.get(task.calls, timeout=MAILBOX_SECONDS)[rank::workers]:
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


def watch(mailbox: "ActorHandle") -> Callable[[], bool]:
    """Watch, in threads, for the end of the sweep and of this node.

    Returns:
        A function that returns whether a trial should write a checkpoint and end; it costs nothing to call.
    """
    flag, node = threading.Event(), ray.get_runtime_context().get_node_id()

    def stop() -> None:
        try:
            ray.get(mailbox.stopped.remote())
            flag.set()
        except ray.exceptions.RayError:
            return  # the worker group is gone, and this worker with it

    def drain() -> None:
        while not flag.wait(DRAIN_CHECK):
            with contextlib.suppress(Exception):  # the control plane is away for a moment
                if node in draining_nodes():
                    flag.set()

    for work in (stop, drain):
        threading.Thread(target=work, daemon=True, name=f"watch-{work.__name__}").start()
    return flag.is_set


class WorkerGroup(ray.tune.Trainable):
    """A Tune trainable whose actor owns a mailbox and, in a thread, one long run of Ray Train.

    It needs `reuse_actors=True` and the resources {"CPU": 0, "memory": 1}: the workers hold the real ones.
    """

    fit: str
    scaling: Scaling
    storage: str
    events: "ActorHandle"

    def setup(self, config: dict[str, Job]) -> None:
        """Start the workers and the first job."""
        self.error: BaseException | None = None
        self.mailbox = Mailbox.remote()  # type: ignore[attr-defined]
        self.stop_requested = self.events.stopped.remote()
        self.thread = threading.Thread(target=self.run_workers, daemon=True)
        self.thread.start()
        self.reset_config(config)

    def run_workers(self) -> None:
        """Run the workers until the mailbox closes."""
        try:
            self.trainer()(
                serve,
                train_loop_config={"mailbox": self.mailbox, "fit": self.fit},
                scaling_config=ray.train.ScalingConfig(**self.scaling),
                run_config=ray.train.RunConfig(
                    name=f"group-{uuid.uuid4().hex[:8]}",
                    storage_path=self.storage,
                    failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=3),
                ),
            ).fit()
        except BaseException as error:  # `step` raises it: nothing waits for this thread
            self.error = error

    def trainer(self) -> type:
        """Return the class that runs the workers."""
        return lean_trainer(self.scaling["num_workers"])

    def reset_config(self, new_config: dict[str, Job]) -> bool:
        """Start the next job."""
        self.job = new_config["job"]
        if not isinstance(self.job, Standby):
            self.version = ray.get(self.mailbox.assign.remote(self.job), timeout=MAILBOX_SECONDS)
        return True

    def step(self) -> FitReport:
        """Return the next report of the job."""
        if isinstance(self.job, Standby):
            reference = self.events.awaited.remote(self.job.version)
        else:
            reference = self.mailbox.take.remote(self.version)
        awaited = [reference, self.stop_requested] if self.stop_requested else [reference]
        while reference not in ray.wait(awaited, timeout=1)[0]:
            if self.stop_requested and ray.wait([self.stop_requested], timeout=0)[0]:
                ray.get(self.mailbox.stop.remote(), timeout=MAILBOX_SECONDS)
                self.stop_requested, awaited = None, [reference]
            if not self.thread.is_alive():
                raise RuntimeError(f"the workers of the group are gone: {self.error}") from self.error
        result: FitReport | None = ray.get(reference)
        return result or FitReport(finished=True, done=True)  # there may be something else to do than to stand by

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Save nothing: the trial's folder holds its state."""
        return {}

    def load_checkpoint(self, checkpoint: object) -> None:
        """Load nothing."""

    def cleanup(self) -> None:
        """Let the workers end."""
        try:
            ray.get(self.mailbox.close.remote(), timeout=CLOSE_SECONDS)
        except ray.exceptions.RayError:
            return
        self.thread.join(JOIN_SECONDS)


def worker_group_class(fit: str, scaling: Scaling, storage: str, events: "ActorHandle") -> type[WorkerGroup]:
    """Return a class of worker groups that run a function.

    Args:
        fit: "module:function", called with a job, `report(epoch, metrics)` and `interrupted()`; it returns whether the
            trial trained to its end.
        scaling: of each group.
        storage: folder for Ray Train's own state.
        events: the sweep's `DriverEvents`.
    """
    attributes = {"fit": fit, "scaling": scaling, "storage": storage, "events": events}
    return type("WorkerGroup", (WorkerGroup,), attributes)
