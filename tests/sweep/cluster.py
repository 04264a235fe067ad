"""A Ray cluster of several nodes on this machine: a head and nodes as processes, which require a token."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.sweep.common import sweep

RAY = str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    """Return free ports of the loopback interface."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def until(condition: Callable[[], Any], seconds: float, what: Callable[[], str]) -> Any:
    """Wait until the condition returns something true, and return it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"never came: {what()}"
        time.sleep(0.1)
    return value


def settings(models: Path, shards: Path, epochs: int, trials: int, **changed: Any) -> dict[str, Any]:
    """Return a sweep whose trials train an encoder, so that it takes long enough to be disturbed."""
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
    """Return how many epochs all trials of a sweep have finished."""
    return sum(path.read_text().count('"macro_f1"') for path in out.glob("trials/*/metrics.jsonl"))


def trials(out: Path) -> list[dict[str, Any]]:
    """Return the trials of `sweep status`."""
    return list(json.loads(sweep("status", out, "--json").out)["trials"])


@dataclass
class Cluster:
    """Running nodes, and what a client needs to connect."""

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
        options = {"env": self.environment, "stdout": log, "stderr": log, "cwd": self.folder}
        self.nodes.append(subprocess.Popen(words, start_new_session=True, **options))
        return self.nodes[-1]

    def state(self, *words: str) -> str:
        """Return the output of `ray …`."""
        run = [RAY, *words]
        return subprocess.run(run, env=self.environment, capture_output=True, text=True, check=True, cwd="/").stdout

    def listed(self, *words: str) -> list[dict[str, Any]]:
        """Return the rows of `ray list …`."""
        output = self.state("list", *words, "--address", self.server, "--format", "json")
        return json.loads(output) if output.lstrip().startswith("[") else []

    def answers(self, *words: str) -> bool:
        """Return whether `ray …` succeeds."""
        return subprocess.run([RAY, *words], env=self.environment, capture_output=True, check=False).returncode == 0


def kill(node: subprocess.Popen[bytes]) -> None:
    """End a node and all its processes at once, as a machine that is switched off."""
    with suppress(psutil.NoSuchProcess):
        processes = [(root := psutil.Process(node.pid)), *root.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=20)
    node.wait(20)


@contextmanager
def cluster(dashboard: bool = True) -> Iterator[Cluster]:
    """Run a head with one CPU that asks for the token; jobs and `ray list` need its dashboard."""
    # The length of socket names is limited, so not under pytest's folder.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_hex(32))
        port, web = free_ports(2)
        server = f"http://127.0.0.1:{web}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        # As in a virtual environment that is active.
        environment |= {"RAY_API_SERVER_ADDRESS": server, "PATH": f"{Path(RAY).parent}:{environment['PATH']}"}
        made = Cluster(folder, environment, f"127.0.0.1:{port}", server)
        try:
            head = [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={web}"]
            head += [] if dashboard else ["--include-dashboard=false"]
            made.add("--head", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", *head, head=True)
            yield made
        finally:
            for node in made.nodes:
                kill(node)
