"""The Ray cluster that RAY_ADDRESS names: connect within a limit, and notice when it goes away.

Ray's core waits for minutes for an address that does not answer, without handling signals, and it ends the process
60 s after the control plane has gone, with a message of its own only.
"""

import atexit
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from data.errors import reason
from sweep.compat import find_ray_cluster, never_connect_again
from sweep.execution.waiting import LimitExceededError, within

PROBE_SECONDS = 10.0  # to open a connection
CONNECT_SECONDS = 120.0  # to join a cluster whose control plane accepts connections
WATCH_SECONDS = 2.0  # between two probes
LOST_SECONDS = 25.0  # without an answer until the cluster counts as gone
# How long Ray's core lets this process live without a control plane, when it is imported; by default 60 s. The driver
# ends by itself before, and says so.
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
os.environ.setdefault(RECONNECT, "600")
Address = tuple[str, int]


class ClusterError(Exception):
    """There is no cluster to run on; the message says what to do."""


class ClusterLostError(ClusterError):
    """The cluster has gone away while the sweep ran on it; rerunning the same command resumes the sweep."""


class ClusterCheck(Protocol):
    """Checks whether the cluster lives: Ray itself would wait for it without end, or end this process."""

    def __call__(self, after_error: bool = False) -> None:
        """Raise a ClusterLostError if the cluster is gone.

        Args:
            after_error: whether a call to Ray has failed, so that one probe without an answer is enough.
        """


@contextlib.contextmanager
def join_cluster(address: str, variables: Mapping[str, str]) -> Iterator[ClusterCheck]:
    """Connect to a cluster, and watch it while the block runs; the caller disconnects.

    Args:
        address: HOST:PORT, or "auto" for the one that `ray start` has started on this machine.
        variables: environment of the cluster's processes that belong to this driver.

    Raises:
        ClusterError: it cannot be reached.
    """
    import ray

    server = parse_address(address)
    if not answers(server):
        raise _unreachable(address, f"nothing answers at {server[0]}:{server[1]}")

    def connect() -> list[Address]:
        ray.init(runtime_env={"env_vars": dict(variables)}, log_to_driver=False, logging_level="ERROR")
        here, nodes = ray.get_runtime_context().get_node_id(), ray.nodes()
        return [
            (str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])) for node in nodes if node["NodeID"] == here
        ]

    try:
        raylets = within(CONNECT_SECONDS, connect, "ray-connect")
    except BaseException as error:
        if isinstance(error, LimitExceededError | KeyboardInterrupt):
            atexit.unregister(ray.shutdown)  # at the end of the process it would wait for this call
        if not isinstance(error, Exception):
            raise
        raise _unreachable(address, reason(error)) from None
    watch = ClusterWatch(address, [server, *raylets])
    watch.start()
    try:
        yield watch.check
    finally:
        watch.ended.set()


class ClusterWatch(threading.Thread):
    """Probes the control plane and the node of this driver, until `ended` is set."""

    def __init__(
        self, name: str, servers: list[Address], every: float = WATCH_SECONDS, limit: float = LOST_SECONDS
    ) -> None:
        super().__init__(daemon=True, name="cluster-watch")
        self.address, self.servers, self.every, self.limit = name, servers, every, limit
        self.ended, self.lost = threading.Event(), threading.Event()

    def run(self) -> None:
        """Set `lost` once a server has not answered for the limit."""
        answered = time.monotonic()
        while not self.ended.wait(self.every):
            started = time.monotonic()
            if all(answers(server) for server in self.servers):
                answered = time.monotonic()
            elif started - answered > self.limit:
                self.lost.set()
                return

    def check(self, after_error: bool = False) -> None:
        """Raise a ClusterLostError if the cluster is gone; see `ClusterCheck`."""
        if self.lost.is_set() or (after_error and not all(answers(server) for server in self.servers)):
            never_connect_again()
            raise ClusterLostError(
                f"the Ray cluster at {self.address} does not answer any more; rerun the same command to resume, on a "
                "cluster that runs"
            )


def parse_address(address: str) -> Address:
    """Return host and port of a cluster.

    Raises:
        ClusterError: it is no address, or `auto` finds no cluster.
    """
    found = find_ray_cluster() if address == "auto" else address
    if found is None:
        raise _unreachable(address, "no cluster of `ray start` runs on this machine; those of other sweeps are private")
    host, _, port = found.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise _unreachable(address, "not of the form HOST:PORT")
    return host.strip("[]"), int(port)


def answers(server: Address) -> bool:
    """Return whether a server accepts connections."""
    try:
        with socket.create_connection(server, timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


def _unreachable(address: str, why: str) -> ClusterError:
    return ClusterError(
        f"RAY_ADDRESS {address}: cannot be reached ({why}); check address and token, "
        "or unset it to run on this machine alone"
    )
