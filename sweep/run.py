"""`sweep run`: the driver. Starts, resumes or extends a sweep; the ledger says what is left to do.

config ─► built-ins resolved ─► Ray ─► Tune: Ledger.ask ─► Slot ─► run_trial ─► Ledger.report / prune / complete
                                                                            └─► Tracker ─► MLflow
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.errors import UserError
from sweep import builtin
from sweep import config as configuration
from sweep.cluster import local_or_remote_ray
from sweep.config import Config
from sweep.ledger import Ledger, trial_config, trial_folder
from sweep.trial import as_run, open_shards

TRIAL_RETRIES = 2  # times Tune starts a trial again in a new slot after its slot was lost
Say = Callable[[str], None]


class Busy(Exception):  # noqa: N818
    """Another process runs this sweep."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the sweep's folder; a kill frees it.

    Raises:
        Busy: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy(f"{folder}: another `sweep run` is working on this sweep; wait for it, or end it first") from None
    try:
        yield
    finally:
        lock.release()


class Driver:
    """One attempt at a sweep."""

    def __init__(self, config: Config, folder: Path, say: Say) -> None:
        self.config = config
        self.folder = folder.absolute()
        self.say = say
        self.ledger = Ledger.open(self.folder, config)

    def bind(self, resolved: Config) -> None:
        """Hold the sweep to its corpus."""
        self.ledger.bind(open_shards(resolved.data).fingerprint)

    def left(self) -> int:
        """Trials that are not in a final state yet."""
        ended = sum(entry.state != "RUNNING" for entry in self.ledger.entries())
        return max(0, self.config.search.trials - ended)

    def data_tags(self, resolved: Config) -> dict[str, str]:
        """What names the corpus in MLflow."""
        shards = open_shards(resolved.data)
        labels = ",".join(shards.manifest.labels)
        return {"corpus": shards.manifest.corpus, "fingerprint": shards.fingerprint, "labels": labels}

    def execute(self, resolved: Config) -> None:
        """Run the trials that are left. Returns early, in an orderly way, on Ctrl-C or SIGTERM."""
        # Read when Ray is imported: the driver shows progress and failures itself, and the ledger keeps every result.
        os.environ.update(RAY_LOG_TO_DRIVER_EVENT_LEVEL="ERROR", RAY_AIR_NEW_OUTPUT="0")
        os.environ.update(TUNE_DISABLE_STRICT_METRIC_CHECKING="1", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
        import ray
        import ray.tune

        from sweep.executor import LedgerScheduler, LedgerSearcher
        from sweep.slot import slot_class

        ray_folder = self.folder / "ray"
        shutil.rmtree(ray_folder, ignore_errors=True)  # Tune's and Train's own state: the ledger replaces it
        with local_or_remote_ray():
            slots = self._slots(resolved, ray.cluster_resources())
            searcher = LedgerSearcher(self.ledger, lambda number, values: self._job(resolved, number, values))
            scaling = {
                "num_workers": resolved.resources.workers,
                "use_gpu": resolved.resources.gpus_per_worker > 0,
                "resources_per_worker": _worker_resources(resolved),
            }
            tuner = ray.tune.Tuner(
                ray.tune.with_resources(
                    slot_class("sweep.trial:fit_job", scaling, str(ray_folder)), {"CPU": 0, "memory": 1}
                ),
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
                    storage_path=str(ray_folder),
                    verbose=0,
                    checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=ray.tune.FailureConfig(max_failures=TRIAL_RETRIES),
                ),
            )
            tuner.fit()
        shutil.rmtree(ray_folder, ignore_errors=True)

    def _slots(self, config: Config, cluster: dict[str, float]) -> int:
        """Trials that run at the same time: what the cluster holds, no more than are left."""
        fit = []
        for name, share in _worker_resources(config).items():
            if share > 0:
                fit.append(int(cluster.get(name, 0) / (share * config.resources.workers) + 1e-9))
        if min(fit) < 1:
            have = {name: cluster.get(name, 0) for name in _worker_resources(config)}
            raise UserError(
                f"resources: a trial needs {config.resources.workers} x {_worker_resources(config)}, the cluster has "
                f"{have}; lower resources.workers or a worker's share"
            )
        slots = min(*fit, config.resources.slots or fit[0], max(1, self.left()))
        self.say(f"{slots} trial{'s' if slots > 1 else ''} at a time; the first starts once its workers are up")
        return slots

    def _job(self, resolved: Config, number: int, values: dict[str, Any]) -> dict[str, Any]:
        folder = trial_folder(self.folder, number)
        folder.mkdir(parents=True, exist_ok=True)
        config = as_run(trial_config(self.config, values), open_shards(resolved.data))
        configuration.write(config, folder / "config.yaml")
        return {
            "folder": str(folder),
            "config": builtin.resolve(config).model_dump(mode="json"),
            "reader": choose_reader(resolved),
        }


def choose_reader(config: Config) -> str:
    """The source of batches that `data.reader` stands for."""
    if config.data.reader != "auto":
        return config.data.reader
    return "local" if Path(config.data.shards).is_dir() else "ray"


def _worker_resources(config: Config) -> dict[str, float]:
    resources = {"CPU": config.resources.cpus_per_worker}
    return resources | ({"GPU": config.resources.gpus_per_worker} if config.resources.gpus_per_worker else {})
