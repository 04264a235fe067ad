"""The Ray cluster: the one that RAY_ADDRESS names, or a small one of this process's own."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any


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
