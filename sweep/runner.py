"""`sweep run`: the driver. Starts, resumes or extends a sweep; the ledger says what is left to do.

config ─► built-ins resolved ─► Ray ─► frozen passes, dry steps ─┐
          ┌──────────────────────────────────────────────────────┘
          └─► Tune: Ledger.ask ─► Slot ─► run_trial ─► Ledger.report / prune / complete ─► Tracker ─► MLflow
"""

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from data.errors import reason
from sweep.cli.console import complain, console
from sweep.cli.run import BAD_INPUT, DONE, INFRASTRUCTURE, UNFINISHED, _conclude, check_inputs
from sweep.config.files import write
from sweep.config.paths import trial_folder
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.config.schema import Config
from sweep.config.version import code_version
from sweep.durability.retention import check_disk, disk_need, prune_checkpoints
from sweep.execution.cluster import ClusterError, local_or_remote_ray
from sweep.execution.resources import Nodes, count_slots, worker_resources
from sweep.execution.signals import Stop
from sweep.execution.trial import as_run, open_shards
from sweep.execution.tune import AWS_SECRETS, GRACE, TRIAL_RETRIES, SweepAbortedError, _look_after, _Work
from sweep.preflight import cache_passes as frozen
from sweep.preflight import dry_run as planner
from sweep.preflight import eta as forecast
from sweep.preflight.checks import skeleton
from sweep.preflight.dry_run import Plan
from sweep.preflight.eta import Forecast
from sweep.search.candidates import first_trial
from sweep.search.study import StudyStore

if TYPE_CHECKING:
    from sweep.config.schema import Config
    from sweep.durability.mirror import Mirror
    from sweep.search.study import StudyStore


Say = Callable[[str], None]


class SweepRunner:
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
        self.study = StudyStore.open(self.folder, config)
        self.cache = frozen.cache_of(config, self.folder)
        self.plan: Plan | None = None

    def bind(self, resolved: ResolvedConfig) -> None:
        """Hold the sweep to its corpus, and note the code that runs."""
        note = self.study.bind(open_shards(resolved).fingerprint, code_version())
        if note:
            self.say(note)

    def left(self) -> int:
        """Trials that are not in a final state yet."""
        ended = sum(entry.state != "RUNNING" for entry in self.study.trials())
        return max(0, self.config.search.trials - ended)

    def execute(self, resolved: ResolvedConfig) -> None:
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

        from sweep.execution.mailbox import StopEvent
        from sweep.execution.tune import StudySearcher

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
            notice = StopEvent.remote()  # type: ignore[attr-defined]
            searcher = StudySearcher(
                self.study,
                make_job=lambda number, values: self._job(resolved, number, values),
                check=self.check,
                stop=notice.give.remote,
                ended=lambda: prune_checkpoints(self.study, self.folder),
            )
            said, started = self._foretell(slots), time.monotonic()
            self._fit(self._tuner(resolved, searcher, notice, slots, ray_folder), searcher, is_up)
            if not self.left():
                forecast.ended(self.folder, said, time.monotonic() - started)
        shutil.rmtree(ray_folder, ignore_errors=True)

    def _tuner(self, config: Config, searcher: Any, notice: Any, slots: int, storage: Path) -> Any:
        import ray.tune
        from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

        from sweep.execution.tune import StudyScheduler
        from sweep.execution.worker_group import worker_group_class

        # Tune would describe its actors by them, which Ray's logs and everybody on the cluster see.
        ENV_VARS_TO_PROPAGATE.difference_update(AWS_SECRETS)
        scaling = {
            "num_workers": config.resources.workers,
            "use_gpu": config.resources.gpus_per_worker > 0,
            "resources_per_worker": worker_resources(config),
        }
        slot = worker_group_class("sweep.execution.trial:fit_job", scaling, str(storage), notice)
        return ray.tune.Tuner(
            ray.tune.with_resources(slot, {"CPU": 0, "memory": 1}),
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

    def _plan(self, resolved: ResolvedConfig, nodes: Nodes, slots: int) -> None:
        """What cannot fit is not drawn."""
        self.plan = planner.make(resolved, self.cache, self.folder, nodes, slots, self.say)
        self.study.fits = self.plan.fits

    def _foretell(self, slots: int) -> Forecast:
        """Say what is left, and keep it until the end."""
        assert self.plan is not None
        said = self.plan.forecast(self.study.trials(), self.study.points_left(), slots)
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
            raise SweepAbortedError(*searcher.fault)
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

    def _job(self, resolved: ResolvedConfig, number: int, values: dict[str, Any]) -> dict[str, Any]:
        folder = trial_folder(self.folder, number)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.for_trial(values)
        trial = resolve(config)
        shards = open_shards(trial)  # which may be of another fold
        write(as_run(config, shards), folder / "config.yaml")
        trial = as_run(trial, shards)
        folders = frozen.folders_for(trial, self.cache)
        frozen.used(folders)
        return {
            "folder": str(folder),
            "config": trial.model_dump_json(),  # Tune copies a tree several times, and keeps the copies
            "reader": choose_reader(resolved),
            "frozen": folders,
        }


def count_trained(config: Config) -> int:
    """Parameters that train in a sweep's first trial."""
    model = skeleton(first_trial(config))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def choose_reader(config: Config) -> str:
    """The source of batches that `data.reader` stands for."""
    if config.data.reader != "auto":
        return config.data.reader
    return "local" if Path(config.data.shards).is_dir() else "ray"


LAST_SECONDS = 15.0  # that MLflow has when the machine is to be taken away; what it lacks then is sent the next time


def run_sweep(config: "Config", folder: Path) -> int:
    """Start a sweep, or go on with it; returns the exit code."""
    from optuna.exceptions import StorageInternalError

    from sweep.durability.lease import LeaseHeldError, LeaseLostError
    from sweep.execution.signals import Stop
    from sweep.execution.tune import SweepAbortedError
    from sweep.tracking.access import tracking_uri

    server = tracking_uri(folder)
    (stop := Stop()).install()
    try:
        return _hold(config, folder, server, stop)
    except SweepAbortedError as fault:
        complain(f"{fault}; the sweep was stopped, and the same command goes on ({folder})")
        return BAD_INPUT if fault.reason == "bad data" else INFRASTRUCTURE
    except (LeaseHeldError, LeaseLostError, ClusterError) as error:
        complain(error)
        return INFRASTRUCTURE
    except OSError as error:
        complain(f"{folder}: {reason(error)}; mend this, and give the same command again")
        return INFRASTRUCTURE
    except StorageInternalError:
        complain(f"{folder}: the ledger's database went away; the same command goes on")
        return INFRASTRUCTURE
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on where it was ({folder})")
        return UNFINISHED


def _hold(config: "Config", folder: Path, server: str, stop: Any) -> int:
    """Work on a sweep as the one who may; returns the exit code."""
    from sweep.durability.lease import hold
    from sweep.tracking.access import check_access

    # A new sweep leaves nothing behind if its inputs are no good; one that is there is not looked into for them
    # unless there is something left to do.
    resolved = None if (folder / "config.yaml").exists() else check_inputs(config)
    if resolved:
        check_access(server, config.name)
    with hold(folder, say=console.print) as lease, _mirror(config, folder, stop) as mirror:

        def check() -> None:
            lease.check()
            if mirror:
                mirror.check()

        code = _drive(config, folder, resolved, check, stop)
    return UNFINISHED if code == DONE and mirror and not mirror.complete else code


@contextlib.contextmanager
def _mirror(config: "Config", folder: Path, stop: Any) -> "Iterator[Mirror | None]":
    """Keep the copy of the sweep's folder, if it has one; at the end it is brought up to date."""
    from sweep.durability.mirror import mirrored

    if config.storage.mirror is None:
        yield None
        return
    with mirrored(folder, config.storage.mirror, console.print) as mirror:
        try:
            yield mirror
        finally:
            if not mirror.finish(LAST_SECONDS if stop.asked.is_set() else 600.0):
                console.print(
                    f"[red]the copy lacks some files[/red] ({escape(str(mirror.error))}); give the command again"
                )


def _drive(
    config: "Config", folder: Path, resolved: ResolvedConfig | None, check: Callable[[], object], stop: Any
) -> int:
    """What the holder of the lease does."""
    from sweep.cli.progress import Display
    from sweep.config.diff import claim_folder
    from sweep.execution.orphans import end_leftovers

    pass  # DROPPED
    from sweep.tracking.tracker import is_shipped, still_has

    claim_folder(config, folder)
    ended = end_leftovers(folder)
    if ended:
        console.print(f"ended {len(ended)} processes that a killed attempt had left")
    driver, shipped = SweepRunner(config, folder, console.print, check, stop), True
    if driver.left() or not is_shipped(folder) or not still_has(config, folder):
        resolved = resolved or check_inputs(config)
        with Display(console, config, folder) as display:
            driver.say = display.say
            shipped = _attempt(driver, resolved)
    return _conclude(driver, shipped)


def _attempt(driver: Any, resolved: ResolvedConfig) -> bool:
    """Run what is left; whether MLflow took everything."""
    from sweep.execution.trial import open_shards
    from sweep.tracking.dataset import Corpus
    from sweep.tracking.tracker import Tracker

    say = driver.say
    driver.bind(resolved)
    corpus = Corpus.of(open_shards(resolved))
    tracker = Tracker(driver.config, driver.folder, corpus, say=lambda text: say(escape(text)))
    tracker.start()
    try:
        if driver.left():
            say("starting Ray")
            driver.execute(resolved)
    finally:
        say("sending the last results to MLflow")
        shipped = tracker.finish(LAST_SECONDS if driver.stop.asked.is_set() else 120.0)
        if not shipped:
            say(f"[red]MLflow lacks some results[/red] ({escape(str(tracker.error))}); give the same command again")
    return shipped
