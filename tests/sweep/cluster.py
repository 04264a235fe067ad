"""A Ray cluster of several nodes on this machine: a head and nodes as processes of their own, with a token."""

import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.sweep.common import sweep

RAY = str(Path(os.sys.executable).parent / "ray")  # type: ignore[attr-defined]


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def until(condition: Callable[[], Any], seconds: float, what: Callable[[], str]) -> Any:
    """What the condition gives, once it gives something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"never came: {what()}"
        time.sleep(0.1)
    return found


def settings(models: Path, shards: Path, epochs: int, trials: int, **changed: Any) -> dict[str, Any]:
    """A sweep whose trials train an encoder, so that it takes long enough to be disturbed."""
    return {
        "name": "job",
        "data": {"shards": str(shards), "history": 1, "reader": "ray"},
        "model": {
            "modality": "speech",
            "trainable": "encoder+new",
            "encoder": {"path": str(models / "whisper")},
            "llm": {"path": str(models / "llm")},
        },
        "train": {"epochs": epochs, "batch_size": 4, "checkpoint_steps": 4},
        "search": {"trials": trials, "pruning": None, "space": {"train.learning_rate": {"low": 1e-3, "high": 1e-2}}},
        "storage": {"keep": None},
        **changed,
    }


def epochs(out: Path) -> int:
    """That all trials of a sweep have finished so far."""
    return sum(path.read_text().count('"macro_f1"') for path in out.glob("trials/*/metrics.jsonl"))


def trials(out: Path) -> list[dict[str, Any]]:
    """What `sweep status` says of each."""
    return list(json.loads(sweep("status", out, "--json").out)["trials"])


@dataclass
class Cluster:
    """Nodes that are up, and what a client needs to reach them."""

    folder: Path
    environment: dict[str, str]
    address: str  # of the control plane
    server: str  # of the jobs
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(self, *more: str, head: bool = False) -> subprocess.Popen[bytes]:
        """Start a node with one CPU."""
        agent, metrics, client = free_ports(3)
        words = [RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"]
        words += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", *more]
        words += [f"--ray-client-server-port={client}"] if head else [f"--address={self.address}"]
        log = (self.folder / f"node-{len(self.nodes)}.log").open("wb")
        process = subprocess.Popen(
            words, env=self.environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
        )
        self.nodes.append(process)
        return process

    def state(self, *words: str) -> str:
        """What `ray …` says about the cluster."""
        run = [RAY, *words]
        return subprocess.run(run, env=self.environment, capture_output=True, text=True, check=True, cwd="/").stdout

    def listed(self, *words: str) -> list[dict[str, Any]]:
        """What `ray list …` says."""
        said = self.state("list", *words, "--address", self.server, "--format", "json")
        found: list[dict[str, Any]] = json.loads(said) if said.lstrip().startswith("[") else []
        return found

    def answers(self, *words: str) -> bool:
        """Whether `ray …` succeeds."""
        return subprocess.run([RAY, *words], env=self.environment, capture_output=True, check=False).returncode == 0


def processes_of(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A node's own process and all below it."""
    try:
        root = psutil.Process(node.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(node: subprocess.Popen[bytes]) -> None:
    """End a node at once with all that runs on it, as a machine that is switched off."""
    own = processes_of(node)
    for process in own:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(own, timeout=20)
    node.wait(20)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A head with one CPU; only those with the token get in."""
    # Names of sockets are limited, so not under pytest's folder.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        (folder / "token").write_text(secrets.token_hex(32))
        port, dashboard = free_ports(2)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        environment = kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        environment["PATH"] = f"{Path(RAY).parent}:{environment['PATH']}"  # as in a virtual environment that is active
        environment |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        made = Cluster(folder, environment, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
        try:
            head = [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
            made.add("--head", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", *head, head=True)
            yield made
        finally:
            for node in made.nodes:
                kill(node)
