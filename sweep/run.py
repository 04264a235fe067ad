"""`sweep run`: the driver. Starts, resumes or extends a sweep; the ledger says what is left to do.

config ─► built-ins resolved ─► Ray ─► Tune: Ledger.ask ─► Slot ─► run_trial ─► Ledger.report / prune / complete
                                                                            └─► Tracker ─► MLflow
"""

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.errors import UserError
from sweep import builtin
from sweep import config as configuration
from sweep.config import Config
from sweep.ledger import Ledger, trial_config, trial_folder
from sweep.trial import open_shards

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
        self.ledger.bind(open_shards(resolved.data.shards).manifest.fingerprint)

    def left(self) -> int:
        """Trials that are not in a final state yet."""
        ended = sum(entry.state != "RUNNING" for entry in self.ledger.entries())
        return max(0, self.config.search.trials - ended)

    def data_tags(self, resolved: Config) -> dict[str, str]:
        """What names the corpus in MLflow."""
        manifest = open_shards(resolved.data.shards).manifest
        return {"corpus": manifest.corpus, "fingerprint": manifest.fingerprint, "labels": ",".join(manifest.labels)}

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
        config = trial_config(self.config, values)
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


@contextlib.contextmanager
def local_or_remote_ray() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names (as `ray job submit` sets it), else one of this driver's own.

    Its dashboard is on loopback; its other ports, which Ray opens on all interfaces, want the token that Ray makes.
    """
    import ray

    # Every Ray process gets these. The address is needed by Train's placement-group cleaner, which otherwise gives up
    # when several Ray instances run on a machine, and leaks the resources of an ended trial.
    variables = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"env_vars": variables}, **quiet)
    else:
        port = free_port()
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        # Keep the processes of Ray Data's read tasks from one epoch to the next: starting one costs 2 CPU-seconds.
        os.environ["RAY_num_workers_soft_limit"] = "64"  # noqa: SIM112 — Ray spells it so
        # A slot is a handful of small processes: start them at once, without a warning for each.
        os.environ["RAY_worker_maximum_startup_concurrency"] = "16"  # noqa: SIM112
        variables["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
        ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=free_port(),
            object_store_memory=512 << 20,
            runtime_env={"env_vars": variables},
            **quiet,
        )
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # `ray.init` put its own in place
    try:
        yield
    finally:
        ray.shutdown()


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _worker_resources(config: Config) -> dict[str, float]:
    resources = {"CPU": config.resources.cpus_per_worker}
    return resources | ({"GPU": config.resources.gpus_per_worker} if config.resources.gpus_per_worker else {})
