"""`mlflow server` as a process of its own, for the tests."""

import contextlib
import os
import shutil
import signal
import sqlite3
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
    """`mlflow server` on loopback; its database can be put aside and replaced while it is down."""

    def __init__(self, folder: Path, empty: Path) -> None:
        self.folder, self.empty, self.port = folder, empty, free_port()
        self.database = folder / "server.db"
        shutil.copy(empty, self.database)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [
            "--backend-store-uri",
            f"sqlite:///{self.database}",
            "--artifacts-destination",
            str(self.folder / "files"),
        ]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        return False

    def kill(self) -> None:
        """The server and the processes it started, which are a group of their own."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            self.process = None

    def copy(self, to: Path) -> None:
        with (
            contextlib.closing(sqlite3.connect(self.database)) as own,
            contextlib.closing(sqlite3.connect(to)) as other,
        ):
            own.backup(other)

    def replace(self, by: Path) -> None:
        for leftover in self.folder.glob("server.db*"):
            leftover.unlink()
        shutil.copy(by, self.database)
