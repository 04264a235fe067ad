"""The Ray cluster: the one that RAY_ADDRESS names, or a local one that this process starts."""

import atexit
import contextlib
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from data.atomic import create_file
from data.errors import reason
from sweep.compat import HIDDEN_RAYLET, forget_ray_token, hide_raylet, init_local_ray, never_connect_again
from sweep.execution import orphans
from sweep.execution.joined_cluster import RECONNECT, ClusterCheck, ClusterError, ClusterLostError, join_cluster
from sweep.execution.waiting import LimitExceededError, Warn, cleaning_up, within

__all__ = ["ClusterCheck", "ClusterError", "ClusterLostError", "free_port", "local_or_remote_ray"]

STARTS = 3  # attempts to start a cluster
START_SECONDS = 180.0  # limit of one attempt: on an overloaded machine a start can hang
SHUTDOWN_SECONDS = 30.0  # for Ray to disconnect; it waits without end for a control plane that is gone
VITAL = ("raylet", HIDDEN_RAYLET, "gcs_server")  # processes without which a local cluster is dead
OWN = ("", "local")  # values of RAY_ADDRESS that name no cluster
RAY = "r"  # Ray's own folder in the scratch folder; the paths of its sockets must be short
TOKEN = "token"  # file in the scratch folder
VARIABLES = {  # environment of every Ray process
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the workers of a group watch their nodes themselves
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextlib.contextmanager
def local_or_remote_ray(folder: Path | None = None, warn: Warn = lambda line: None) -> Iterator[ClusterCheck]:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or else start a local one.

    A local cluster belongs to this process alone: no other program finds it by the address `auto`, and it requires a
    token that only its own processes have. It has no dashboard; Ray opens its ports on all interfaces.

    Args:
        folder: of a sweep, where the processes of a local cluster are recorded.
        warn: shows a line to the user when something cannot be cleaned up.

    Raises:
        ClusterError: the cluster cannot be reached, or does not start.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    with contextlib.ExitStack() as stack:
        if address not in OWN:
            stack.callback(_disconnect, warn)
            yield stack.enter_context(join_cluster(address, VARIABLES))
            return
        scratch = _scratch_folder()
        stack.enter_context(private_token(scratch))
        stack.enter_context(orphans.recorded(folder, scratch, warn))
        ended = threading.Event()
        stack.callback(ended.set)
        stack.callback(_disconnect, warn)
        with _private_settings(scratch):
            _start(scratch, ended)
        vital = [process for process in orphans.cluster_processes(scratch).items() if _is_vital(*process)]

        def check(after_error: bool = False) -> None:
            if not all(_is_vital(*process) for process in vital):
                never_connect_again()
                raise ClusterLostError("Ray's node on this machine has died; rerun the same command to resume")

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


def _start(scratch: Path, ended: threading.Event) -> None:
    """Start a local cluster, which lives until `ended` is set; retry a start that fails or hangs."""
    import ray

    for retries_left in reversed(range(STARTS)):
        try:
            # Ray lets Linux kill its processes when the thread that has started them ends.
            within(START_SECONDS, lambda: _start_once(scratch), "ray-start", ended)
            return
        except KeyboardInterrupt:
            atexit.unregister(ray.shutdown)  # it would wait for the start
            orphans.kill(orphans.cluster_processes(scratch))
            raise
        except Exception as error:
            orphans.kill(orphans.cluster_processes(scratch))  # also ends a start that hangs
            with contextlib.suppress(Exception):
                within(SHUTDOWN_SECONDS, ray.shutdown, "ray-shutdown")
            if not retries_left:
                raise ClusterError(f"Ray does not start on this machine ({reason(error)}); free some memory") from None


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
