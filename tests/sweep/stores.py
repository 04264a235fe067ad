"""The storages of a study, for tests: a journal file, SQLite, and a PostgreSQL server that the tests start.

A module imports the fixture `storage`; its tests with the mark `every_storage` run on all three.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from optuna.storages.journal import JournalFileBackend

from sweep.config.schema import Config
from tests.sweep import common

BINARIES = ("initdb", "postgres")
LEDGER: dict[str, str | None] = {"url": None}  # `storage.ledger` of the settings that tests make


class Postgres:
    """A server on a free port of this machine, with a folder of its own; it can be taken down and up."""

    def __init__(self) -> None:
        missing = [name for name in BINARIES if shutil.which(name) is None]
        if missing:
            pytest.skip(f"no PostgreSQL server here ({', '.join(missing)} not on PATH)")
        self.owner = _other_user()  # the server refuses to run as root
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        if "user" in self.owner:
            os.chown(self.folder, self.owner["user"], self.owner["group"])
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._call("initdb", "--auth=trust", "--username=sweep", "--no-sync", "--locale=C", "-D", self.data)
        self.url = f"postgresql://sweep@127.0.0.1:{self.port}/postgres"
        self.start()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def _call(self, *command: str | Path) -> None:
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **self.owner)

    def start(self) -> None:
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self.folder), "-c", "fsync=off"]
        with (self.folder / "log").open("ab") as log:
            command = ["postgres", "-D", str(self.data), *options]
            self.server = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self.owner)
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self.server.poll() is not None:
                    raise AssertionError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.1)

    def stop(self) -> None:
        """Take it down, connections cut."""
        self.server.send_signal(signal.SIGINT)
        self.server.wait(30)

    def end(self) -> None:
        if self.server.poll() is None:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _other_user() -> dict[str, Any]:
    if os.getuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.end()


@pytest.fixture(scope="session")
def shared_sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all sweeps: to create its tables takes most of a test's time."""
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'studies.db'}"


@pytest.fixture(autouse=True)
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Storage of the studies of a test: a journal file, unless the test is marked `every_storage`."""
    kind = getattr(request, "param", "journal")
    if kind == "sqlite":
        monkeypatch.setitem(LEDGER, "url", request.getfixturevalue("shared_sqlite"))
    elif kind == "postgresql":
        monkeypatch.setitem(LEDGER, "url", request.getfixturevalue("postgres").url)
    return str(kind)


every_storage = pytest.mark.parametrize("storage", ["journal", "sqlite", "postgresql"], indirect=True)


def settings(**search: Any) -> Config:
    """Return `common.settings` on the storage of the test."""
    return at(LEDGER["url"], common.settings(**search))


def pruned(**search: Any) -> Config:
    """Return `common.pruned` on the storage of the test."""
    return at(LEDGER["url"], common.pruned(**search))


def at(url: str | None, config: Config) -> Config:
    """Return the sweep with its study in another storage."""
    return config.with_values({"storage.ledger": url})


def kill_at_writes(every: int, work: Callable[[], object]) -> int:
    """Do some work again and again until it ends; return how often it was killed.

    Args:
        every: writes to a study's journal until the next kill, right after the last of them.
        work: runs or resumes a study.
    """
    written, kills, write = 0, 0, JournalFileBackend.append_logs

    def killing(backend: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        nonlocal written
        written += 1
        write(backend, logs)
        if written % every == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", killing)
        while True:
            try:
                work()
            except KeyboardInterrupt:
                kills += 1
            else:
                return kills
