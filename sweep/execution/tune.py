"""Run the trials of a sweep under Ray Tune.

    StudyStore.ask ─► StudySearcher ─► Tune ─► WorkerGroup ─► fit_job
    StudyStore.report / complete / fail ◄─ StudyScheduler, StudySearcher ◄─ Tune

The study decides and keeps every result; Tune only executes, so nothing of its own state is read again.
"""

import gc
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from data.errors import UserError, reason
from sweep.compat import share_environment
from sweep.config.resolve import ResolvedConfig
from sweep.config.space import Value
from sweep.execution.cluster import TRIAL, ClusterCheck, ClusterError, worker_resources
from sweep.execution.job import FitReport, Job, Standby, TrialJob
from sweep.execution.mailbox import DriverEvents
from sweep.execution.signals import StopRequest
from sweep.execution.tasks import QueueClosedError, TaskQueue
from sweep.execution.waiting import MOMENT, Work
from sweep.execution.worker_group import Scaling, worker_group_class
from sweep.search.sampling.draw import TOO_LARGE
from sweep.search.study import NextTrial, Reason, StudyStore, TrialRecord

if TYPE_CHECKING:
    from ray.actor import ActorHandle

MakeJob = Callable[[int, dict[str, Value]], TrialJob]
T = TypeVar("T")

TRIAL_RETRIES = 5  # times Tune restarts a trial in a new worker group after its group was lost
QUIET_SECONDS = 1800.0  # without a report until a line says what may be wrong
STUCK = "the cluster has no free place for the workers, or a worker hangs; `ray status` and `ray stack` show it"
GRACE = 60.0  # seconds that trials have for their last checkpoint when the sweep is asked to stop
IDLE_GRACE = 5.0  # the same for worker groups if no trial runs
MOST_HELD = 16  # trials that are drawn and wait for the feature cache
COMMON_FAULT = 3  # equal failures, with no other end before them, after which the sweep itself is at fault
COMMON_FAULT_BY_PARAMETERS = 6  # the same for failures that other parameters may avoid
BY_PARAMETERS = ("non-finite", "out of memory")


def common_fault(trials: Sequence[TrialRecord]) -> str | None:
    """Return what makes every trial fail (a wrong path, a full disk), in a line; call it when a trial has failed.

    The sweep is at fault if no trial has ever ended otherwise and the last ones failed alike. Failures that other
    parameters may avoid need more of them. Where trials have ended otherwise, the last ones must have failed alike for
    a cause outside their configurations: something broke during the sweep, and further trials would only fail, too.
    """
    ended = [trial for trial in trials if trial.has_ended]
    if not ended or ended[-1].state != "FAIL":
        return None
    last = ended[-1]
    if any(trial.state != "FAIL" for trial in ended):
        if any(not trial.outside or trial.reason == "workers lost" for trial in ended[-COMMON_FAULT:]):
            return None
        ended_as = "failed alike"
    else:
        ended_as = "failed alike and none was finished"
    enough = COMMON_FAULT_BY_PARAMETERS if last.reason in BY_PARAMETERS else COMMON_FAULT
    # Digits tell one trial from another: they are in the names of folders and in steps.
    alike = {(trial.reason, re.sub(r"\d+", "#", trial.why)) for trial in ended[-enough:]}
    if len(ended) < enough or len(alike) > 1:
        return None
    return f"the last {enough} trials {ended_as} ({last.reason}: {last.why}); fix this first"


class SweepAbortedError(Exception):
    """The same failure hits every trial, so the sweep was stopped; its running trials resume once it is fixed.

    Args:
        why: one line for the user.
        reason: kind of the failure, see `StudyStore.fail`.
    """

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(why)
        self.reason = reason


class StudySearcher(Searcher):
    """Suggest the trials that an earlier run left unfinished, under their numbers, and then new ones.

    Args:
        study: of the sweep.
        make_job: returns what a trial's workers receive.
        check: raises LeaseLostError when another process has taken the sweep over.
        stop: asks all worker groups to end.
        ended: called after a trial has ended.
        queue: tasks besides trials, and which trials must wait.
    """

    def __init__(
        self,
        study: StudyStore,
        make_job: MakeJob,
        check: Callable[[], object],
        stop: Callable[[], object],
        ended: Callable[[], object],
        queue: TaskQueue,
    ) -> None:
        super().__init__(metric=study.config.search.metric, mode="max")
        self.study, self.make_job, self.queue = study, make_job, queue
        self.check, self.stop, self.ended = check, stop, ended
        self.numbers: dict[str, int] = {}  # Tune's trial id → number in the study, of the running trials
        self.held: dict[int, dict[str, Value]] = {}  # the values of trials that are drawn and wait
        self.active = time.monotonic()  # when a trial has started, reported or ended last
        self.stopping = False
        self.fault: tuple[str, str] | None = None  # message and kind of a failure that hits every trial

    def __getstate__(self) -> dict[str, object]:
        """Return nothing: Tune saves its searcher, and the study must not be copied."""
        return {}

    def set_search_properties(self, *_: object, **__: object) -> bool:
        """Accept Tune's settings; the study has its own."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Job] | str:
        """Return the next job of a free worker group, or FINISHED.

        Tasks come first: trials may wait for them, and nothing waits for a trial. But while no trial runs, a trial
        that need not wait starts before them, so that results come from the beginning on.
        """
        self.check()
        while not self.stopping:
            version = self.queue.version
            if self.numbers and (task := self.queue.take(trial_id)) is not None:
                return {"job": task}
            try:
                asked = self._next_trial()
            except UserError as error:  # nothing that the sampler draws fits into memory
                self._abort(str(error), "out of memory")
                break
            if asked is None:
                if (task := self.queue.take(trial_id)) is not None:
                    return {"job": task}
                if self.queue.waits is None or self.held or self.study.waits(list(self.numbers.values())):
                    return {"job": Standby(version)}
                break
            self.active = time.monotonic()
            number, values = asked
            try:
                job = self.make_job(number, values)
            except UserError as error:  # each value is allowed, but not this combination; or a file is missing
                if error.common:
                    self._abort(str(error), error.reason)
                    break
                self._fail(number, str(error), cast("Reason", error.reason), error.outside)
                continue
            self.numbers[trial_id] = number
            return {"job": job}
        return str(Searcher.FINISHED)

    def _next_trial(self) -> NextTrial | None:
        """Return a trial that may start; None if there is none now.

        Trials that must wait are drawn and held, as long as the values of the next one do not depend on results.
        """
        if (waits := self.queue.waits) is None:
            return None
        for number in sorted(self.held):
            if not waits(self.held[number]):
                values = self.held.pop(number)
                if self.study.fits(values):
                    return NextTrial(number, values)
                self.study.fail(number, TOO_LARGE, reason="out of memory")  # as the plan has found meanwhile
        while len(self.held) < MOST_HELD:
            busy, target = [*self.numbers.values(), *self.held], self.study.config.search.trials
            asked = self.study.ask(busy, target, ahead=bool(self.held))
            if asked is None or not waits(asked.params):
                return asked
            self.held[asked.number] = asked.params
        return None

    def report(self, trial_id: str, result: FitReport) -> bool:
        """Report an epoch to the study, and return whether the trial ends here."""
        self.check()
        self.active = time.monotonic()
        ends = self.study.report(self.numbers[trial_id], result["epoch"], json.loads(result["metrics"]))
        self.queue.announce_change()  # another trial may be promoted now
        return ends

    def on_trial_complete(self, trial_id: str, result: FitReport | None = None, error: bool = False) -> None:
        """Record how a trial or a task ended."""
        result = result or FitReport()
        if self.queue.ended(trial_id, result, error):
            self.active = time.monotonic()
        number = self.numbers.pop(trial_id, None)
        if number is None:
            return
        self.check()
        if result.get("finished"):
            self.study.complete(number)
        elif result.get("interrupted"):
            pass  # it stays RUNNING, and resumes when the command is rerun
        elif result.get("common"):
            self._abort(result["failed"], result["reason"])
        elif "failed" in result:
            self._fail(number, result["failed"], cast("Reason", result["reason"]), result.get("outside"))
        elif error and not self.stopping:
            self._fail(number, "its workers were lost too often", "workers lost")
        try:
            self.ended()
        except UserError as fault:  # a checkpoint that cannot be deleted
            self._abort(str(fault), fault.reason)
        self.queue.announce_change()

    def _fail(self, number: int, why: str, reason: Reason, outside: bool | None = None) -> None:
        self.study.fail(number, why, reason=reason, outside=outside)
        trials = self.study.trials()
        if (fault := common_fault(trials)) is not None:
            if reason not in BY_PARAMETERS:
                self.study.excuse([trial.number for trial in trials if trial.state == "FAIL"])
            self._abort(fault, reason)

    def _abort(self, why: str, reason: str) -> None:
        self.fault = self.fault or (why, reason)
        self.end()

    def end(self) -> None:
        """Start no more trials, and ask the running ones to write their checkpoints."""
        if not self.stopping:
            self.stopping = True
            self.stop()

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is persistent."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class StudyScheduler(FIFOScheduler):
    """Ask the study after every report whether the trial continues."""

    def __init__(self, searcher: StudySearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def __getstate__(self) -> dict[str, object]:
        """Return nothing, as the searcher does."""
        return {}

    def on_trial_result(self, tune_controller: object, trial: Trial, result: FitReport) -> str:
        """Report the epoch, and return Tune's decision."""
        ended = self.searcher.report(trial.trial_id, result)
        decision: str = TrialScheduler.STOP if ended else TrialScheduler.CONTINUE
        return decision


class BackgroundWork(Work[T]):
    """Run a function that uses the cluster in a thread; it ends with the cluster."""

    def __init__(self, work: Callable[[], T], name: str, check_cluster: ClusterCheck) -> None:
        self.check_cluster = check_cluster
        super().__init__(work, name)

    def wait(self) -> None:
        """Wait for a moment.

        Raises:
            ClusterLostError: the cluster is gone, for which Ray itself would wait without end.
        """
        self.join(MOMENT)
        self.check_cluster()

    def result(self) -> T:
        """Wait until the function has ended, and return or raise what it did.

        Raises:
            ClusterError: Ray has failed.
        """
        while self.is_alive():
            self.wait()
        if self.error is not None and not isinstance(self.error, UserError):
            self.check_cluster(after_error=True)
        if isinstance(self.error, ray.exceptions.RayError):
            raise ClusterError(f"Ray failed ({reason(self.error)}); rerun the same command to resume") from self.error
        return self.outcome()


def run_trials(
    study: StudyStore,
    resolved: ResolvedConfig,
    slots: int,
    storage: Path,
    started: Sequence["ActorHandle"],
    prepare: Callable[[TaskQueue], None],
    make_job: MakeJob,
    check: Callable[[], object],
    ended: Callable[[], object],
    stop: StopRequest,
    check_cluster: ClusterCheck,
    say: Callable[[str], None],
) -> None:
    """Run trials until the study has its target, or return early when the sweep is asked to stop.

    Args:
        study: of the sweep.
        resolved: configuration of the sweep.
        slots: worker groups.
        storage: folder for the state of Tune and Train, which is never read again.
        started: workers that run already.
        prepare: prepares the trials in a thread, with tasks for the worker groups, and lets trials start.
        make_job: returns what a trial's workers receive.
        check: raises LeaseLostError when another process has taken the sweep over.
        ended: called after a trial has ended.
        stop: whether the sweep was asked to stop.
        check_cluster: raises a ClusterLostError once the cluster is gone.
        say: shows a line to the user.

    Raises:
        SweepAbortedError: the same failure would hit every trial.
        ClusterError: the cluster is gone, or Ray has failed.
        UserError: the preparation has failed.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the searcher reports worker groups that are lost
    share_environment()
    events, queue = DriverEvents(), TaskQueue()
    queue.announce = events.announce
    searcher = StudySearcher(study, make_job, check, events.stop, ended, queue)
    tuner = _tuner(resolved, slots, storage, searcher, events.key, started)
    stop.graceful = True
    try:
        # What is imported is no garbage. Among so many objects, Python would collect what trials leave too rarely.
        gc.freeze()
        tune, stopped_at = BackgroundWork(tuner.fit, "tune", check_cluster), None
        preparation = BackgroundWork(lambda: prepare(queue), "preparation", check_cluster)
        while tune.is_alive() and not (stopped_at and _is_over(searcher, stopped_at)):
            tune.wait()
            if time.monotonic() - searcher.active > QUIET_SECONDS:
                say(f"no trial has started or reported for {QUIET_SECONDS / 60:.0f} min: long epochs, or {STUCK}")
                searcher.active = time.monotonic()
            if stopped_at is None and (stop.requested.is_set() or searcher.stopping or preparation.error):
                stopped_at = time.monotonic()
                if searcher.numbers:
                    say("stopping: the running trials write their checkpoints")
                searcher.end()
    finally:
        gc.unfreeze()  # in a notebook, these objects may become garbage
        stop.graceful = False
        queue.close()
        events.close()
    check()
    if searcher.fault:
        raise SweepAbortedError(*searcher.fault)
    if preparation.error and not isinstance(preparation.error, QueueClosedError):
        preparation.result()  # raises the error
    if not tune.is_alive():
        tune.result()


def _is_over(searcher: StudySearcher, stopped_at: float) -> bool:
    """Return whether a sweep that was asked to stop need not wait any longer for its worker groups."""
    return time.monotonic() - stopped_at >= (GRACE if searcher.numbers else IDLE_GRACE)


def _tuner(
    resolved: ResolvedConfig,
    slots: int,
    storage: Path,
    searcher: StudySearcher,
    events: str,
    started: Sequence["ActorHandle"],
) -> ray.tune.Tuner:
    """Return what runs the trials of a searcher in worker groups; see `run_trials`."""
    scaling: Scaling = {
        "num_workers": resolved.resources.workers,
        "use_gpu": resolved.resources.gpus_per_worker > 0,
        "resources_per_worker": worker_resources(resolved),
    }
    group = worker_group_class(TRIAL, scaling, str(storage), events, started)
    return ray.tune.Tuner(
        ray.tune.with_resources(group, {"CPU": 0, "memory": 1}),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=StudyScheduler(searcher),
            num_samples=-1,
            max_concurrent_trials=slots,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name=f"attempt-{int(time.time())}",
            storage_path=str(storage),
            verbose=0,
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=ray.tune.FailureConfig(max_failures=TRIAL_RETRIES),
        ),
    )
