"""`mlflow server` as a process of its own, for the tests."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from sweep.execution.cluster import free_port


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.1)


class Server:
    """`mlflow server` on loopback, in its own process group; it can be killed and restarted.

    Args:
        folder: for its database, its artifacts and its log; created if it does not exist.
        empty: a database to begin with; None: the server creates one.
    """

    def __init__(self, folder: Path, empty: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.database = folder / "server.db"
        if empty is not None:
            shutil.copy(empty, self.database)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        files, address = self.folder / "files", ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        words = ["--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(files), *address]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
        environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # as infra/mlflow: it takes processes of its own
        with (self.folder / "server.log").open("ab") as log:
            command = [sys.executable, "-m", "mlflow", "server", *words]
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        if wait:
            wait_for(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        return False

    def kill(self) -> None:
        """Kill the server and the processes that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None
