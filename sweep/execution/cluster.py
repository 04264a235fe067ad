"""The Ray cluster: the one that RAY_ADDRESS names, or a small one of this process's own."""

import contextlib
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.atomic import UNFINISHED, create_file
from data.errors import reason
from sweep.execution import orphans as leftovers

STARTS = 3  # times that a cluster is tried to start
VITAL = ("raylet", "gcs_server")  # processes without which a cluster of one node is dead
START_SECONDS = 180.0  # that a start may take: on a starved machine it can hang for ever


class ClusterError(Exception):
    """There is no cluster to run on; the message is complete."""


@contextlib.contextmanager
def local_or_remote_ray(folder: Path | None = None) -> Iterator[Callable[[], bool]]:
    """The cluster that RAY_ADDRESS names (as `ray job submit` sets it), else one of this driver's own.

    Its dashboard is on loopback; its other ports, which Ray opens on all interfaces, want the token that Ray makes.

    Args:
        folder: of a sweep; what a kill of this process leaves behind is written down there.

    Yields:
        Whether this machine's node still lives, if it is a cluster of this driver's own: Ray would wait for ever.

    Raises:
        ClusterError: it cannot be reached, or does not start.
    """
    import ray

    scratch = Path(tempfile.mkdtemp(prefix=leftovers.PREFIX, dir=leftovers.temporary()))
    with leftovers.recorded(folder, scratch):
        try:
            if os.environ.get("RAY_ADDRESS"):
                _connect()
                yield lambda: True
            else:
                _start(scratch)
                vital = [own for own in leftovers.children().items() if leftovers.is_called(own, VITAL)]
                yield lambda: all(leftovers.is_called(own, VITAL) for own in vital)
        finally:
            ray.shutdown()


def _variables() -> dict[str, str]:
    """The environment of every Ray process."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the workers of a slot look themselves
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def _connect() -> None:
    import ray

    try:
        ray.init(runtime_env={"env_vars": _variables()}, **QUIET)
    except Exception as error:
        raise ClusterError(
            f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: cannot be reached ({reason(error)}); check address and token, "
            "or unset it to run on this machine alone"
        ) from None


def _start(scratch: Path) -> None:
    """Start a cluster on this machine; a start that fails or hangs is tried again."""
    import ray

    for left in reversed(range(STARTS)):
        before = leftovers.children()
        watchdog = threading.Timer(START_SECONDS, lambda known=before: _end_new(known))
        watchdog.start()
        try:
            _start_once(scratch)
            return
        except Exception as error:
            ray.shutdown()
            _end_new(before)
            if not left:
                raise ClusterError(f"Ray does not start on this machine ({reason(error)}); free some memory") from None
        finally:
            watchdog.cancel()


def _start_once(scratch: Path) -> None:
    import ray

    keep_token()
    port = free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    # Keep the processes of Ray Data's read tasks from one epoch to the next: starting one costs 2 CPU-seconds.
    os.environ["RAY_num_workers_soft_limit"] = "64"  # noqa: SIM112 — Ray spells it so
    # A slot is a handful of small processes: start them at once, without a warning for each.
    os.environ["RAY_worker_maximum_startup_concurrency"] = "16"  # noqa: SIM112
    # Inherited by Ray's processes: as a `runtime_env`, every worker would start twice, and none of those that Ray
    # starts beforehand would be of use.
    os.environ.update(_variables())
    # Train's placement-group cleaner needs the address: without it, it gives up when several Ray instances run on a
    # machine, and leaks the resources of an ended trial.
    os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
    try:
        ray.init(
            address="local",
            num_cpus=_fewer_cpus(),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=free_port(),
            object_store_memory=512 << 20,
            _temp_dir=str(scratch),
            **QUIET,
        )
    finally:
        del os.environ["RAY_ADDRESS"]  # it is for them alone


def _fewer_cpus() -> int | None:
    """The CPUs of this process, where a batch system left it fewer than the machine has: Ray would take them all."""
    own = len(os.sched_getaffinity(0))
    return own if own < (os.cpu_count() or own) else None


def keep_token() -> None:
    """Make the token that Ray's processes want, where Ray looks for it; Ray's own would be readable for everybody."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():  # another sweep may make it at the same moment
        token = secrets.token_hex(32)
        create_file(path, token, temporary=path.with_name(f"{path.name}{UNFINISHED}{secrets.token_hex(8)}"), mode=0o600)
    path.parent.chmod(0o700)
    path.chmod(0o600)


def _end_new(before: leftovers.Known) -> None:
    leftovers.end({pid: started for pid, started in leftovers.children().items() if pid not in before})


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
