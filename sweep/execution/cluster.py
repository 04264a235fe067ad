"""The Ray cluster: the one that RAY_ADDRESS names, or a local one that this process starts."""

import contextlib
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from data.atomic import UNFINISHED, create_file
from data.errors import reason
from sweep.compat import init_local_ray
from sweep.execution import orphans

STARTS = 3  # attempts to start a cluster
START_SECONDS = 180.0  # limit of one attempt: on an overloaded machine a start can hang
VITAL = ("raylet", "gcs_server")  # processes without which a local cluster is dead
VARIABLES = {  # environment of every Ray process
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the workers of a group watch their nodes themselves
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


class ClusterError(Exception):
    """There is no cluster to run on; the message says what to do."""


@contextlib.contextmanager
def local_or_remote_ray(folder: Path | None = None) -> Iterator[Callable[[], bool]]:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or else start a local one.

    The dashboard of a local cluster is on loopback. Ray opens its other ports on all interfaces; they require the token
    of `keep_token`.

    Args:
        folder: of a sweep, where the processes of a local cluster are recorded.

    Yields:
        A function that returns whether a local cluster still lives: Ray itself would wait for it without end.

    Raises:
        ClusterError: the cluster cannot be reached, or does not start.
    """
    import ray

    scratch = Path(tempfile.mkdtemp(prefix=orphans.PREFIX, dir=orphans.scratch_root()))
    with orphans.recorded(folder, scratch):
        try:
            if os.environ.get("RAY_ADDRESS"):
                _connect()
                yield lambda: True
            else:
                _start(scratch)
                children = orphans.child_processes().items()
                vital = [process for process in children if orphans.is_running_as(*process, VITAL)]
                yield lambda: all(orphans.is_running_as(*process, VITAL) for process in vital)
        finally:
            ray.shutdown()


def _connect() -> None:
    import ray

    try:
        ray.init(runtime_env={"env_vars": VARIABLES}, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        raise ClusterError(
            f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: cannot be reached ({reason(error)}); check address and token, "
            "or unset it to run on this machine alone"
        ) from None


def _start(scratch: Path) -> None:
    """Start a local cluster; retry a start that fails or hangs."""
    import ray

    for retries_left in reversed(range(STARTS)):
        before = orphans.child_processes()

        def end_new(before: orphans.Processes = before) -> None:
            children = orphans.child_processes()
            orphans.kill({pid: started for pid, started in children.items() if pid not in before})

        watchdog = threading.Timer(START_SECONDS, end_new)
        watchdog.start()
        try:
            _start_once(scratch)
            return
        except Exception as error:
            ray.shutdown()
            end_new()
            if not retries_left:
                raise ClusterError(f"Ray does not start on this machine ({reason(error)}); free some memory") from None
        finally:
            watchdog.cancel()


def _start_once(scratch: Path) -> None:
    import ray

    keep_token()
    port = free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    # Keep the processes of Ray Data's read tasks from one epoch to the next: starting one costs 2 CPU-seconds.
    os.environ["RAY_num_workers_soft_limit"] = "64"  # noqa: SIM112 — Ray's spelling
    # A worker group is several small processes: start them at once, without a warning for each.
    os.environ["RAY_worker_maximum_startup_concurrency"] = "16"  # noqa: SIM112
    # Ray's processes inherit these. With a `runtime_env` every worker would start twice, because the workers that Ray
    # starts in advance have none.
    os.environ.update(VARIABLES)
    # Train's placement-group cleaner needs the address: without it, it gives up when several Ray instances run on a
    # machine, and leaks the resources of an ended trial. Only the processes that `init` starts may see it.
    os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
    # Ray would use all CPUs of the machine, also those that a batch system withholds from this process.
    cpus = len(os.sched_getaffinity(0))
    try:
        init_local_ray(
            scratch,
            num_cpus=cpus if cpus < (os.cpu_count() or cpus) else None,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=free_port(),
            object_store_memory=512 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    finally:
        del os.environ["RAY_ADDRESS"]


def keep_token() -> None:
    """Create the token that Ray's processes require, where Ray looks for it; other users could read Ray's own file."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():  # another sweep may create it at the same moment
        token = secrets.token_hex(32)
        create_file(path, token, temporary=path.with_name(f"{path.name}{UNFINISHED}{secrets.token_hex(8)}"), mode=0o600)
    path.parent.chmod(0o700)
    path.chmod(0o600)


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
