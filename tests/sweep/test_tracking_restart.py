"""A real MLflow server is killed -9 while a sweep ships to it, three times, and comes back: with its database, with an
older copy of it, and with nothing. Afterwards it shows what the trials wrote, each point once."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweep.cluster import free_port
from sweep.ledger import Ledger
from sweep.tracking import Tracker, is_shipped, mlflow_run_id, tracking_uri
from tests.sweep.common import report
from tests.sweep.tracked import CONFIG, DATA, append, curve, runs, shown_params, written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


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


@pytest.fixture
def server(database: Path, tmp_path: Path) -> Iterator[Server]:
    (place := tmp_path / "server").mkdir()
    own = Server(place, database)
    try:
        own.start()
        yield own
    finally:
        own.kill()


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.1)


def test_a_server_that_is_killed_and_comes_back_with_less(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("sweep.tracking.LONGEST", 0.5)
    steps = iter(range(48, 1000, 16))

    def train(points: int) -> None:
        for step in (next(steps) for _ in range(points)):
            append(folder, 3, (step, 1000.0 + step, 1 / step))

    def arrived() -> bool:
        return mlflow_run_id(folder, 3) is not None and repr(curve(folder, 3)) == repr(written(folder, 3))

    tracker = Tracker(CONFIG, folder, DATA, every=0.05)
    tracker.start()
    wait_for(arrived)
    before = [run.info.run_id for run in runs(folder)[1]]
    server.copy(older := folder.parent / "older.db")
    for database in (None, older, server.empty):
        train(2)
        wait_for(arrived)
        train(1)
        server.kill()
        train(1)
        wait_for(lambda: tracker.error is not None)
        assert tracker.is_alive()
        if database is not None:
            server.replace(database)
        server.start()
        wait_for(lambda: tracker.error is None)
        wait_for(arrived)
        assert ([run.info.run_id for run in runs(folder)[1]] == before) == (database is not server.empty)
    train(1)
    report(ledger := Ledger.open(folder, CONFIG), 3, 0.95)
    ledger.complete(3)
    assert tracker.finish(180), tracker.error
    check(folder)
    assert capsys.readouterr().out == "", "standard output is the command line's"


def check(folder: Path) -> None:
    """MLflow shows the ledger, and the curves that were written, point by point."""
    parent, children = runs(folder)
    entries = Ledger.read(folder, CONFIG).entries()
    assert (parent.info.status, is_shipped(folder)) == ("FINISHED", True)
    assert [run.info.status for run in children] == ["FINISHED", "KILLED", "FAILED", "FINISHED"]
    for entry, run in zip(entries, children, strict=True):
        assert run.data.params == shown_params(entry)
        for name in ("loss", "f1"):
            assert repr(curve(folder, entry.number, name)) == repr(written(folder, entry.number, name))
        files = {file.path for file in MlflowClient(tracking_uri(folder)).list_artifacts(run.info.run_id)}
        assert files >= (
            {"config.yaml", "confusion_matrix.png", "predictions.json"} if entry.number == 0 else {"config.yaml"}
        )
