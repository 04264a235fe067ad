"""The Ray cluster: the one that RAY_ADDRESS names, or a local one that this process starts; what trials get of it."""

import atexit
import contextlib
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from data.atomic import create_file
from data.errors import UserError, reason
from sweep.compat import HIDDEN_RAYLET, forget_ray_token, hide_raylet, init_local_ray, never_connect_again
from sweep.config.schema import Config
from sweep.execution import orphans
from sweep.execution.joined_cluster import RECONNECT, ClusterCheck, ClusterError, ClusterLostError, join_cluster
from sweep.execution.waiting import MOMENT, LimitExceededError, Warn, Work, cleaning_up, within

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["ClusterCheck", "ClusterError", "ClusterLostError", "RayStart", "free_port", "local_or_remote_ray"]

# Ray reads these when it is imported. The runner reports progress and failures itself, and the study keeps every
# result, while Tune would write all trials to disk again and again.
os.environ.update(
    RAY_LOG_TO_DRIVER_EVENT_LEVEL="ERROR",
    RAY_AIR_NEW_OUTPUT="0",
    TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_GLOBAL_CHECKPOINT_S="1e9",
)

STARTS = 3  # attempts to start a cluster
START_SECONDS = 180.0  # limit of one attempt: on an overloaded machine a start can hang
ABORT_SECONDS = 5.0  # for a start to end whose processes are killed
SHUTDOWN_SECONDS = 30.0  # for Ray to disconnect; it waits without end for a control plane that is gone
VITAL = ("raylet", HIDDEN_RAYLET, "gcs_server")  # processes without which a local cluster is dead
OWN = ("", "local")  # values of RAY_ADDRESS that name no cluster
RAY = "r"  # Ray's own folder in the scratch folder; the paths of its sockets must be short
TRIAL = "sweep.execution.trial:fit_job"  # what workers do
TOKEN = "token"  # file in the scratch folder
VARIABLES = {  # environment of every Ray process
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the workers of a group watch their nodes themselves
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
Nodes = Sequence[Mapping[str, float]]  # Ray resources of each node, by name


class RayStart:
    """Starts a local cluster in a thread, while this process does something else; or joins the one of RAY_ADDRESS.

    A local cluster belongs to this process alone: no other program finds it by the address `auto`, and it requires a
    token that only its own processes have. It has no dashboard; Ray opens its ports on all interfaces. At the end of
    the context it is gone, also if its start was not over.

    Args:
        warn: shows a line to the user when something cannot be cleaned up.
        early: whether `begin` begins. Where Ray's start is given up, Ray may end this process: a command ends then
            anyway, and a notebook must not.
    """

    def __init__(self, warn: Warn = lambda line: None, *, early: bool = True) -> None:
        self.warn = warn
        self.early = early
        self.address = os.environ.get("RAY_ADDRESS", "")
        self.workers: list[ActorHandle] = []  # that were started with the local cluster
        self.scratch: Path | None = None  # of the local cluster, once it was begun
        self._config: Config | None = None
        self._trials = 0
        self._attempt: Work[None] | None = None
        self._ended = threading.Event()
        self._settings, self._stack = contextlib.ExitStack(), contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._abort()

    def begin(self, config: Config, trials: int) -> None:
        """Begin to start a local cluster before it is needed; see `connected` for what is raised.

        Args:
            config: of a sweep, whose workers are started, too.
            trials: that are left.
        """
        if self.early:
            self._begin(config, trials)

    def _begin(self, config: Config | None = None, trials: int = 0) -> None:
        """Begin to start a local cluster, and return at once; do nothing where another one is named or it was begun."""
        import ray

        from sweep.execution import worker  # noqa: F401 — see `_start`

        if self.scratch is not None:
            return
        if ray.is_initialized():  # its nodes and settings are not those that a sweep needs
            raise UserError("Ray is connected already in this process; call ray.shutdown() first")
        if self.address not in OWN:
            return
        scratch = self.scratch = _scratch_folder()
        self._config, self._trials = config, trials
        self._stack.enter_context(private_token(scratch))
        self._stack.enter_context(orphans.killed_at_end(scratch, self.warn))
        self._settings.enter_context(_private_settings(scratch))
        self._try(scratch)

    @contextlib.contextmanager
    def connected(self, folder: Path | None = None) -> Iterator[ClusterCheck]:
        """Wait until the cluster is there; disconnect at the end of the block, which ends a local cluster.

        Args:
            folder: of a sweep, where the processes of a local cluster are recorded.

        Raises:
            ClusterError: the cluster cannot be reached, or does not start.
            UserError: Ray is connected already in this process, as it may be in a notebook.
        """
        self._begin()
        if self.address not in OWN:
            with contextlib.ExitStack() as stack:
                stack.callback(_disconnect, self.warn)
                yield stack.enter_context(join_cluster(self.address, VARIABLES))
            return
        assert self.scratch is not None
        scratch = self.scratch
        if folder is not None:
            self._stack.enter_context(orphans.recorded(folder, scratch, self.warn))
        self._finish(scratch)
        self._stack.callback(self._ended.set)
        self._stack.callback(_disconnect, self.warn)
        self._attempt = None
        with self._stack:
            vital = [process for process in orphans.cluster_processes(scratch).items() if _is_vital(*process)]

            def check(after_error: bool = False) -> None:
                if not all(_is_vital(*process) for process in vital):
                    never_connect_again()
                    raise ClusterLostError("Ray's node on this machine has died; rerun the same command to resume")

            yield check

    def _try(self, scratch: Path) -> None:
        # Ray lets Linux kill its processes when the thread that has started them ends.
        self._attempt = Work(lambda: self._start(scratch), "ray-start", self._ended)

    def _start(self, scratch: Path) -> None:
        """Start Ray, and the workers; the caller has imported what this needs, as it may import something else now."""
        import ray

        from sweep.execution.worker import start_worker

        _start_once(scratch)
        if self._config is not None and self._config.resources.workers == 1:
            with contextlib.suppress(UserError):  # the sweep raises it once its inputs are checked
                slots = count_slots(self._config, [ray.cluster_resources()], self._trials)
                resources = worker_resources(self._config)
                self.workers = [start_worker(TRIAL, resources, restarts=-1) for _ in range(slots)]

    def _finish(self, scratch: Path) -> None:
        """Wait for the start, and repeat one that fails or hangs."""
        import ray

        for retries_left in reversed(range(STARTS)):
            assert self._attempt is not None
            try:
                self._attempt.within(START_SECONDS)
                self._settings.close()
                return
            except Exception as error:
                orphans.kill(orphans.cluster_processes(scratch))  # also ends a start that hangs
                with contextlib.suppress(Exception):
                    within(SHUTDOWN_SECONDS, ray.shutdown, "ray-shutdown")
                if not retries_left:
                    raise ClusterError(
                        f"Ray does not start on this machine ({reason(error)}); free some memory"
                    ) from None
                self._try(scratch)

    def _abort(self) -> None:
        """End a cluster that was begun, and that nothing has waited for to the end."""
        with self._stack, self._settings:
            if (attempt := self._attempt) is None:
                return
            import ray

            looks = round(ABORT_SECONDS / MOMENT)
            while not attempt.done.wait(MOMENT) and looks:  # it may start more before it notices
                orphans.kill(orphans.cluster_processes(self.scratch))
                looks -= 1
            if attempt.done.is_set() and attempt.error is None:
                _disconnect(self.warn)
            else:
                atexit.unregister(ray.shutdown)  # at the end of the process it would wait for the start
            self._ended.set()


@contextlib.contextmanager
def local_or_remote_ray(folder: Path | None = None, warn: Warn = lambda line: None) -> Iterator[ClusterCheck]:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or else start a local one.

    See `RayStart` for the arguments, and for what is raised.
    """
    with RayStart(warn) as start, start.connected(folder) as check:
        yield check


def _is_vital(pid: int, started: float) -> bool:
    return orphans.is_running_as(pid, started, VITAL)


def _disconnect(warn: Warn) -> None:
    """Disconnect from Ray, which also ends the processes that it has started."""
    import ray

    with cleaning_up("disconnect from Ray", warn):
        try:
            within(SHUTDOWN_SECONDS, ray.shutdown, "ray-shutdown")
        except (LimitExceededError, KeyboardInterrupt):
            atexit.unregister(ray.shutdown)  # at the end of the process it would wait for this call
            raise


def _scratch_folder() -> Path:
    """Create the folder of a local cluster."""
    root = orphans.scratch_root()
    try:
        return Path(tempfile.mkdtemp(prefix=orphans.PREFIX, dir=root))
    except OSError as error:
        raise ClusterError(
            f"{root}: Ray needs a folder there ({reason(error)}); free some space, or set TMPDIR to a short path that "
            "can be written"
        ) from None


def _start_once(scratch: Path) -> None:
    import ray

    port = free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    # Train's placement-group cleaner needs the address: without it, it gives up when several Ray instances run on a
    # machine, and leaks the resources of an ended trial.
    os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
    (scratch / RAY).mkdir(exist_ok=True)
    # Ray would use all CPUs of the machine, also those that a batch system withholds from this process.
    cpus = len(os.sched_getaffinity(0))
    init_local_ray(
        scratch / RAY,  # Ray lets everybody write into this one, and not into the one around it
        num_cpus=cpus if cpus < (os.cpu_count() or cpus) else None,
        object_store_memory=512 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )


@contextlib.contextmanager
def _private_settings(scratch: Path) -> Iterator[None]:
    """Set what the processes of a local cluster inherit, and hide from others what belongs to them alone."""
    # Keep the processes of Ray Data's read tasks from one epoch to the next: starting one costs 2 CPU-seconds.
    os.environ["RAY_num_workers_soft_limit"] = "64"  # noqa: SIM112 — Ray's spelling
    # A worker group is several small processes: start them at once, without a warning for each.
    os.environ["RAY_worker_maximum_startup_concurrency"] = "16"  # noqa: SIM112
    # Ray's processes inherit these. With a `runtime_env` every worker would start twice, because the workers that Ray
    # starts in advance have none.
    os.environ.update(VARIABLES)
    private: dict[str, str | None] = {orphans.MARK: str(scratch), "RAY_ADDRESS": None, RECONNECT: None}
    previous = {name: os.environ.get(name) for name in private}
    _set(private)
    restore = hide_raylet(scratch)
    try:
        yield
    finally:
        restore()
        _set(previous)


@contextlib.contextmanager
def private_token(scratch: Path) -> Iterator[None]:
    """Let Ray use a token of its own for a local cluster, unless the user has set one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        yield
        return
    _set({"RAY_AUTH_TOKEN_PATH": str(write_token(scratch))})
    forget_ray_token()  # of an earlier cluster of this process
    try:
        yield
    finally:
        _set({"RAY_AUTH_TOKEN_PATH": None})
        forget_ray_token()


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def write_token(scratch: Path) -> Path:
    """Write the token that the processes of a local cluster require into its folder, which only its owner can read."""
    path = scratch / TOKEN
    create_file(path, secrets.token_hex(32), temporary=scratch / f".{TOKEN}", mode=0o600)
    return path


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def count_slots(config: Config, nodes: Nodes, left: int) -> int:
    """Return the number of trials that run at the same time: as many as the nodes hold, at most as many as are left.

    Ray Data's read tasks request no CPU, so nothing is reserved for them.

    Args:
        config: of the sweep.
        nodes: of the cluster.
        left: trials that have not ended.

    Raises:
        UserError: the nodes cannot hold one trial, and `resources.slots` does not say that the cluster grows.
    """
    need, workers, wanted = worker_resources(config), config.resources.workers, config.resources.slots
    fit = sum(_capacity(config, node) for node in nodes) // workers
    if fit < 1 and wanted is None:
        have = [{name: node.get(name, 0) for name in need} for node in nodes]
        raise UserError(
            f"resources: a trial needs {workers} x {need}, the nodes have {have}; lower resources.workers or a "
            "worker's share, or set resources.slots if the cluster grows on demand"
        )
    slots = min(fit, wanted or fit) if fit else wanted or 1
    return min(slots, max(1, left))


def worker_resources(config: Config) -> dict[str, float]:
    """Return the resources that Ray reserves for one worker."""
    resources = {"CPU": config.resources.cpus_per_worker}
    return resources | ({"GPU": config.resources.gpus_per_worker} if config.resources.gpus_per_worker else {})


def memory_share(config: Config, nodes: Nodes, slots: int) -> float:
    """Return the share of a GPU's memory, or without GPUs of a node's, that a worker may use.

    Args:
        config: of the sweep.
        nodes: of the cluster.
        slots: trials that run at the same time.
    """
    resources = config.resources
    if resources.gpus_per_worker:
        return min(1.0, resources.gpus_per_worker)
    workers = max((_capacity(config, node) for node in nodes), default=1)
    return 1 / max(1, min(workers, slots * resources.workers))


def _capacity(config: Config, node: Mapping[str, float]) -> int:
    """Return the number of workers that a node has room for."""
    return min(int(node.get(name, 0) / share + 1e-9) for name, share in worker_resources(config).items())
