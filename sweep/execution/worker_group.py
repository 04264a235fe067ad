"""Worker groups: a Tune actor keeps one group of workers running and feeds it trial after trial.

    Tune ── reset_config ──► WorkerGroup ── assign ──► Mailbox ── next ──► workers: fit(job, report, interrupted)
    Tune ◄── step ────────── WorkerGroup ◄── take ──── Mailbox ◄─ report ─ (waits until Tune has decided)

Workers that share a trial are those of Ray Train, which connects them. The only worker of a group is an actor
(`run_alone`), without the four processes that Ray Train starts around its workers. On a local cluster the driver
starts these actors, before there is a group.

Besides trials, a group does tasks (`sweep.execution.tasks`), and it stands by while there is nothing to do.

A new group for every trial would cost some 20 s and 24 CPU-seconds; the second and later trials of a group cost about
half a second. Reports go in lockstep, so a pruned trial stops in every worker at the same epoch.
"""

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import ray
import ray.tune

from sweep.compat import lean_trainer
from sweep.execution.job import FitReport, Job, Standby
from sweep.execution.mailbox import Events, Mailbox, read_events
from sweep.execution.worker import ServeConfig, serve, start_worker

if TYPE_CHECKING:
    from ray.actor import ActorHandle

MAILBOX_SECONDS = 300.0  # for a mailbox to start and to answer
CLOSE_SECONDS = 5.0  # for a mailbox to close
JOIN_SECONDS = 10.0  # for the workers of a closed mailbox to end; Ray ends the rest
LOOK, STANDBY_LOOK = 0.5, 0.2  # seconds between two looks at what the driver says, while there is a job and without
FREE_LOOK = 0.5  # seconds between two looks for a free worker


class Scaling(TypedDict):
    """Arguments of `ray.train.ScalingConfig`."""

    num_workers: int
    use_gpu: bool
    resources_per_worker: dict[str, float]


def serve_together(group: ServeConfig) -> None:
    """Run in every worker of a group that Ray Train has connected."""
    import ray.train

    context = ray.train.get_context()
    serve(group, context.get_world_rank(), context.get_world_size())


def run_alone(group: ServeConfig, resources: Mapping[str, float], started: Sequence["ActorHandle"]) -> None:
    """Run the only worker of a group until the mailbox closes.

    The workers that the driver has started hold the resources of all groups. So a group waits for one that is free:
    Tune ends groups and starts others, and a worker serves one after another. Ray restarts those that die. Where the
    driver has started none, a group starts its own, and another one when it dies.

    Args:
        group: what the worker receives.
        resources: of the worker.
        started: workers that the driver has started.

    Raises:
        ActorDiedError: the mailbox is gone, or workers cannot start.
    """
    while True:
        for worker in started or [start_worker(group["fit"], resources)]:
            try:
                if ray.get(worker.serve.remote(group)):
                    return
            except ray.exceptions.ActorDiedError:
                if started:  # Ray does not restart it, so no group can have it
                    raise
            except ray.exceptions.RayTaskError:  # the mailbox counts the starts of a job, and gives up
                ray.kill(worker, no_restart=not started)
            except ray.exceptions.RayError:
                if not started:
                    ray.kill(worker)
        ray.get(group["mailbox"].__ray_ready__.remote())  # without it no worker has anything to do
        if started:
            time.sleep(FREE_LOOK)


class WorkerGroup(ray.tune.Trainable):
    """A Tune trainable whose actor owns a mailbox and runs its workers in a thread.

    It needs `reuse_actors=True` and the resources {"CPU": 0, "memory": 1}: the workers hold the real ones.
    """

    fit: str
    scaling: Scaling
    storage: str
    events: str
    started: "Sequence[ActorHandle]"

    def setup(self, config: dict[str, Job]) -> None:
        """Start the workers and the first job."""
        self.error: BaseException | None = None
        self.mailbox = Mailbox.remote()  # type: ignore[attr-defined]
        self.stopping, self.looked = False, time.monotonic()
        self.thread = threading.Thread(target=self.run_workers, daemon=True)
        self.thread.start()
        self.reset_config(config)

    def run_workers(self) -> None:
        """Run the workers until the mailbox closes."""
        group: ServeConfig = {"mailbox": self.mailbox, "fit": self.fit}
        try:
            if self.scaling["num_workers"] == 1:
                run_alone(group, self.scaling["resources_per_worker"], self.started)
                return
            import ray.train

            lean_trainer()(
                serve_together,
                train_loop_config=dict(group),
                scaling_config=ray.train.ScalingConfig(**self.scaling),
                run_config=ray.train.RunConfig(
                    name=f"group-{uuid.uuid4().hex[:8]}",
                    storage_path=self.storage,
                    failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=3),
                ),
            ).fit()
        except BaseException as error:  # `step` raises it: nothing waits for this thread
            self.error = error

    def reset_config(self, new_config: dict[str, Job]) -> bool:
        """Start the next job."""
        self.job = new_config["job"]
        if not isinstance(self.job, Standby):
            self.version = ray.get(self.mailbox.assign.remote(self.job), timeout=MAILBOX_SECONDS)
        return True

    def step(self) -> FitReport:
        """Return the next report of the job."""
        if isinstance(self.job, Standby):
            while (events := self.look()).version <= self.job.version and not events.stopping:
                time.sleep(STANDBY_LOOK)
            return FitReport(finished=True, done=True)  # there may be something else to do than to stand by
        reference = self.mailbox.take.remote(self.version)
        while not ray.wait([reference], timeout=LOOK)[0]:
            self.look()
        if time.monotonic() - self.looked > LOOK:
            self.look()
        result: FitReport = ray.get(reference)
        return result

    def look(self) -> Events:
        """Return what the driver has said; let the trial write a checkpoint once the sweep is asked to stop.

        Raises:
            RuntimeError: the workers are gone.
        """
        if not self.thread.is_alive():
            raise RuntimeError(f"the workers of the group are gone: {self.error}") from self.error
        events, self.looked = read_events(self.events), time.monotonic()
        if events.stopping and not self.stopping:
            ray.get(self.mailbox.stop.remote(), timeout=MAILBOX_SECONDS)
            self.stopping = True
        return events

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


def worker_group_class(
    fit: str, scaling: Scaling, storage: str, events: str, started: "Sequence[ActorHandle]" = ()
) -> type[WorkerGroup]:
    """Return a class of worker groups that run a function.

    Args:
        fit: "module:function", called with a job, `report(epoch, metrics)` and `interrupted()`; it returns whether the
            trial trained to its end.
        scaling: of each group.
        storage: folder for Ray Train's own state.
        events: key of the sweep's `DriverEvents`.
        started: workers that the driver has started already.
    """
    attributes = {"fit": fit, "scaling": scaling, "storage": storage, "events": events, "started": started}
    return type("WorkerGroup", (WorkerGroup,), attributes)
