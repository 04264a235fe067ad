"""A machine with PostgreSQL and the MLflow server of `infra/mlflow`, set up as docs/mlflow.md says, for the tests."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from mlflow import MlflowClient

from sweep.execution.cluster import free_port
from tests.sweep.mlflow_server import wait_for
from tests.sweep.stores import Postgres

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra/mlflow"
PUBLIC = "mlflow.example.org"
ACCESS = """
local all all trust
host all sweep 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""


def settings(**values: object) -> str:
    """env.example with other values; also a commented setting can be given one."""
    text = (INFRA / "env.example").read_text()
    for name, value in values.items():
        text, found = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert found == 1, name
    return text


@dataclass
class Site:
    """The server, and the commands of its administrator."""

    folder: Path
    postgres: Postgres
    database: str = "mlflow"
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.artifacts, self.backups = self.folder / "artifacts", self.folder / "backups"
        self.secrets, self.log = self.folder / "secrets", self.folder / "server.log"
        self.uri = f"http://127.0.0.1:{self.port}"
        subprocess.run([INFRA / "secrets.sh", self.secrets], check=True)
        self.configure()
        self.sql(f"CREATE ROLE {self.database} LOGIN PASSWORD '{self.secret('database-password')}'")
        self.make_database()
        (self.postgres.data / "pg_hba.conf").write_text(ACCESS)
        self.sql("SELECT pg_reload_conf()")

    def configure(self, *more: str, **values: object) -> None:
        """Write /etc/mlflow/env, so to say."""
        own = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "MLFLOW_SECRETS": self.secrets,
            "PGHOST": "127.0.0.1",
            "PGUSER": self.database,
            "PGDATABASE": self.database,
            "MLFLOW_ARTIFACTS_DESTINATION": self.artifacts,
            "MLFLOW_BACKUPS": self.backups,
            "MLFLOW_PORT": self.port,
            "MLFLOW_WORKERS": 1,
            "MLFLOW_PUBLIC_HOST": PUBLIC,
        }
        lines = [settings(**own | values), f"PGPORT={self.postgres.port}", *more]
        (self.folder / "env").write_text("\n".join(lines) + "\n")

    @property
    def environment(self) -> dict[str, str]:
        return {"MLFLOW_SETTINGS": str(self.folder / "env"), "PATH": "/usr/bin:/bin", "HOME": str(self.folder)}

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text()

    def sql(self, statement: str) -> None:
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            connection.execute(statement)

    def make_database(self) -> None:
        self.sql(f"CREATE DATABASE {self.database} OWNER {self.database} ENCODING 'UTF8' TEMPLATE template0")

    def lose_everything(self) -> None:
        """Database and artifacts are gone."""
        self.sql(f"DROP DATABASE {self.database}")
        shutil.rmtree(self.artifacts)

    def call(self, script: str, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a script of the administrator's, in the environment of cron."""
        command = [str(INFRA / script), *map(str, words)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def do(self, script: str, *words: object) -> str:
        """The last line of a script that has to succeed."""
        found = self.call(script, *words)
        assert found.returncode == 0, f"{script}\n{found.stdout}\n{found.stderr}"
        return found.stdout.strip().rpartition("\n")[2]

    def account(self, name: str) -> dict[str, str]:
        """What a user puts into the environment."""
        found = self.call("account.sh", "add", name)
        assert found.returncode == 0, found.stderr
        given = dict(line.split("=", 1) for line in found.stdout.splitlines())
        return {"MLFLOW_TRACKING_URI": self.uri, **given}

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [INFRA / "serve.sh"],
                env=self.environment,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        wait_for(lambda: self.process.poll() is not None or answers(self.uri), 300)
        assert self.process.poll() is None, self.log.read_text()[-3000:]

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """End the server and what it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, by)
            self.process.wait(60)
            self.process = None


def answers(uri: str) -> bool:
    """Whether the server is healthy, as a probe asks: without an account."""
    return status(f"{uri}/health") == 200


def status(url: str, user: dict[str, str] | None = None, body: object = None, **more: str) -> int:
    """Return the status of a request with or without an account; 0 if the server does not answer."""
    headers = {"Content-Type": "application/json", **{name.title(): value for name, value in more.items()}}
    if user is not None:
        pair = f"{user['MLFLOW_TRACKING_USERNAME']}:{user['MLFLOW_TRACKING_PASSWORD']}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        return int(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def acting(user: dict[str, str]) -> Iterator[MlflowClient]:
    """Yield a client that acts as this user only."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("MLFLOW_", "AWS_")):
                patch.delenv(name)
        for name, value in user.items():
            patch.setenv(name, value)
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield MlflowClient(user["MLFLOW_TRACKING_URI"])
