"""`sweep run`: the driver. Starts, resumes or extends a sweep; the ledger says what is left to do.

config ─► built-ins resolved ─► Ray ─► frozen passes, dry steps ─┐
          ┌──────────────────────────────────────────────────────┘
          └─► Tune: Ledger.ask ─► Slot ─► run_trial ─► Ledger.report / prune / complete ─► Tracker ─► MLflow
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweep import builtin, forecast, frozen, planner
from sweep import config as configuration
from sweep.changes import code_version
from sweep.cluster import ClusterError, local_or_remote_ray
from sweep.config import Config
from sweep.forecast import Forecast
from sweep.inputs import first_trial, skeleton
from sweep.ledger import Ledger, trial_config, trial_folder
from sweep.nodes import Nodes, count_slots, worker_resources
from sweep.planner import Plan
from sweep.retention import check_disk, disk_need, prune_checkpoints
from sweep.stop import Stop
from sweep.trial import as_run, open_shards

TRIAL_RETRIES = 5  # times Tune starts a trial again in a new slot after its slot was lost
GRACE = 60.0  # seconds that trials have for their last checkpoint when the sweep is to stop
AWS_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
Say = Callable[[str], None]


class SweepFault(Exception):  # noqa: N818
    """Something hits every trial, so the sweep was stopped; those that were running go on when it is mended.

    Args:
        why: in one line.
        reason: in a word, see `Ledger.fail`.
    """

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(why)
        self.reason = reason


class Driver:
    """One attempt at a sweep, by the holder of its lease.

    Args:
        config: of the sweep.
        folder: of the sweep.
        say: shows a line to people.
        check: raises Lost where another driver has taken the sweep over.
        stop: whether the sweep was asked to end.
    """

    def __init__(self, config: Config, folder: Path, say: Say, check: Callable[[], object], stop: Stop) -> None:
        self.config, self.folder = config, folder.absolute()
        self.say, self.check, self.stop = say, check, stop
        self.ledger = Ledger.open(self.folder, config)
        self.cache = frozen.cache_of(config, self.folder)
        self.plan: Plan | None = None

    def bind(self, resolved: Config) -> None:
        """Hold the sweep to its corpus, and note the code that runs."""
        note = self.ledger.bind(open_shards(resolved.data).fingerprint, code_version())
        if note:
            self.say(note)

    def left(self) -> int:
        """Trials that are not in a final state yet."""
        ended = sum(entry.state != "RUNNING" for entry in self.ledger.entries())
        return max(0, self.config.search.trials - ended)

    def execute(self, resolved: Config) -> None:
        """Run the trials that are left. Returns early, in an orderly way, when the sweep is to stop.

        Raises:
            SweepFault: going on makes no sense before somebody mends something.
            ClusterError: there is nothing to run on.
        """
        # Read when Ray is imported: the driver shows progress and failures itself, and the ledger keeps every result.
        # Tune would write down all trials again and again.
        os.environ.update(RAY_LOG_TO_DRIVER_EVENT_LEVEL="ERROR", RAY_AIR_NEW_OUTPUT="0")
        os.environ.update(TUNE_DISABLE_STRICT_METRIC_CHECKING="1", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
        os.environ.update(TUNE_GLOBAL_CHECKPOINT_S="1e9")
        import ray

        from sweep.executor import LedgerSearcher
        from sweep.mailbox import Notice

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a slot that is lost is told by what follows
        ray_folder = self.folder / "ray"
        shutil.rmtree(ray_folder, ignore_errors=True)  # Tune's and Train's own state: the ledger replaces it
        with local_or_remote_ray(self.folder) as is_up:
            self.stop.install()
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            slots = count_slots(resolved, nodes, self.left())
            self._compute(lambda: frozen.compute(resolved, self.cache, self.say), is_up)
            self._compute(lambda: self._plan(resolved, nodes, slots), is_up)
            self.say(f"{slots} trial{'s' if slots > 1 else ''} at a time; the first starts once its workers are up")
            self.say(check_disk(self.folder, disk_need(resolved, count_trained(resolved), slots)))
            notice = Notice.remote()  # type: ignore[attr-defined]
            searcher = LedgerSearcher(
                self.ledger,
                make_job=lambda number, values: self._job(resolved, number, values),
                check=self.check,
                stop=notice.give.remote,
                ended=lambda: prune_checkpoints(self.ledger, self.folder),
            )
            said, started = self._foretell(slots), time.monotonic()
            self._fit(self._tuner(resolved, searcher, notice, slots, ray_folder), searcher, is_up)
            if not self.left():
                forecast.ended(self.folder, said, time.monotonic() - started)
        shutil.rmtree(ray_folder, ignore_errors=True)

    def _tuner(self, config: Config, searcher: Any, notice: Any, slots: int, storage: Path) -> Any:
        import ray.tune
        from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

        from sweep.executor import LedgerScheduler
        from sweep.slot import slot_class

        # Tune would describe its actors by them, which Ray's logs and everybody on the cluster see.
        ENV_VARS_TO_PROPAGATE.difference_update(AWS_SECRETS)
        scaling = {
            "num_workers": config.resources.workers,
            "use_gpu": config.resources.gpus_per_worker > 0,
            "resources_per_worker": worker_resources(config),
        }
        slot = slot_class("sweep.trial:fit_job", scaling, str(storage), notice)
        return ray.tune.Tuner(
            ray.tune.with_resources(slot, {"CPU": 0, "memory": 1}),
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=LedgerScheduler(searcher),
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

    def _plan(self, resolved: Config, nodes: Nodes, slots: int) -> None:
        """What cannot fit is not drawn."""
        self.plan = planner.make(resolved, self.cache, self.folder, nodes, slots, self.say)
        self.ledger.fits = self.plan.fits

    def _foretell(self, slots: int) -> Forecast:
        """Say what is left, and keep it until the end."""
        assert self.plan is not None
        said = self.plan.forecast(self.ledger.entries(), self.ledger.points_left(), slots)
        self.say(planner.told(self.config, said, slots))
        forecast.remember(self.folder, said)
        return said

    def _compute(self, work: Callable[[], None], is_up: Callable[[], bool]) -> None:
        """Do what comes before the trials; a signal ends it at once, since what was done is kept."""
        thread = _Work(work, "before the trials")
        while thread.is_alive():
            _look_after(thread, is_up)
        thread.raise_error()

    def _fit(self, tuner: Any, searcher: Any, is_up: Callable[[], bool]) -> None:
        """Run Tune in a thread, where it leaves the signals alone, and look out for the end."""
        self.stop.patient = True
        try:
            thread = _Work(tuner.fit, "tune")
            self._watch(thread, searcher, is_up)
        finally:
            self.stop.patient = False
        self.check()
        if searcher.fault:
            raise SweepFault(*searcher.fault)
        thread.raise_error()

    def _watch(self, thread: threading.Thread, searcher: Any, is_up: Callable[[], bool]) -> None:
        """Wait for Tune's end; once the sweep is to stop, no longer than GRACE."""
        asked = None
        while thread.is_alive() and (asked is None or time.monotonic() - asked < GRACE):
            _look_after(thread, is_up)
            if asked is None and (self.stop.asked.is_set() or searcher.stopping):
                asked = time.monotonic()
                self.say("stopping: the trials that run write their checkpoints")
                searcher.end()

    def _job(self, resolved: Config, number: int, values: dict[str, Any]) -> dict[str, Any]:
        folder = trial_folder(self.folder, number)
        folder.mkdir(parents=True, exist_ok=True)
        config = trial_config(self.config, values)
        config = as_run(config, open_shards(builtin.resolve(config).data))  # which may be of another fold
        configuration.write(config, folder / "config.yaml")
        own = builtin.resolve(config)
        folders = frozen.folders_for(own, self.cache)
        frozen.used(folders)
        return {
            "folder": str(folder),
            "config": own.model_dump_json(),  # Tune copies a tree several times, and keeps the copies
            "reader": choose_reader(resolved),
            "frozen": folders,
        }


class _Work(threading.Thread):
    """A thread that keeps what was raised in it."""

    def __init__(self, work: Callable[[], Any], name: str) -> None:
        super().__init__(daemon=True, name=name)
        self.work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # for the thread that waits
            self.error = error

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


def _look_after(thread: threading.Thread, is_up: Callable[[], bool]) -> None:
    """Wait a moment; raise a ClusterError where the node has died: Ray would wait for ever."""
    thread.join(0.2)
    if not is_up():
        raise ClusterError("Ray's node on this machine has died; the same command goes on")


def count_trained(config: Config) -> int:
    """Parameters that train in a sweep's first trial."""
    model = skeleton(first_trial(config))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def choose_reader(config: Config) -> str:
    """The source of batches that `data.reader` stands for."""
    if config.data.reader != "auto":
        return config.data.reader
    return "local" if Path(config.data.shards).is_dir() else "ray"
