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
from pathlib import Path

import psycopg
import pytest
from mlflow import MlflowClient
from werkzeug.security import generate_password_hash

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
    """Return env.example with other values; a commented setting can be given one, too."""
    text = (INFRA / "env.example").read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert count == 1, name
    return text


class Site:
    """The server, and the commands of its administrator."""

    def __init__(self, folder: Path, postgres: Postgres, database: str = "mlflow") -> None:
        self.folder, self.postgres, self.database = folder, postgres, database
        self.artifacts, self.backups, self.secrets = (folder / name for name in ("artifacts", "backups", "secrets"))
        self.port, self.process = free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"
        subprocess.run([INFRA / "secrets.sh", self.secrets], check=True)
        self.configure()
        self.sql(f"CREATE ROLE {database} LOGIN PASSWORD '{self.secret('database-password')}'")
        self.make_database()
        (postgres.data / "pg_hba.conf").write_text(ACCESS)
        self.sql("SELECT pg_reload_conf()")

    def configure(self, *more: str, **changed: object) -> None:
        """Write the file that stands for /etc/mlflow/env."""
        values = {
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
        lines = [settings(**values | changed), f"PGPORT={self.postgres.port}", *more]
        (self.folder / "env").write_text("\n".join(lines) + "\n")

    @property
    def environment(self) -> dict[str, str]:
        return {"MLFLOW_SETTINGS": str(self.folder / "env"), "PATH": "/usr/bin:/bin", "HOME": str(self.folder)}

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text()

    def sql(self, statement: str, database: str = "postgres") -> None:
        with psycopg.connect(self.postgres.url, dbname=database, autocommit=True) as connection:
            connection.execute(statement)

    def make_database(self) -> None:
        self.sql(f"CREATE DATABASE {self.database} OWNER {self.database} ENCODING 'UTF8' TEMPLATE template0")

    def lose_everything(self) -> None:
        """Drop the database and the artifacts."""
        self.sql(f"DROP DATABASE {self.database}")
        shutil.rmtree(self.artifacts)

    def call(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the administrator's, in the environment of cron."""
        return subprocess.run(
            [INFRA / script, *words], env=self.environment, capture_output=True, text=True, check=False
        )

    def succeed(self, script: str, *words: str) -> list[str]:
        """Return the lines that a script prints, which has to succeed."""
        done = self.call(script, *words)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout.splitlines()

    def account(self, name: str) -> dict[str, str]:
        """Add an account; return what its user puts into the environment."""
        lines = self.succeed("account.sh", "add", name)
        return {"MLFLOW_TRACKING_URI": self.uri, **dict(line.split("=", 1) for line in lines)}

    def quick_account(self, name: str) -> dict[str, str]:
        """Add an account with a cheap hash: MLflow computes it several times a request, and its own takes 0.1 s."""
        user = self.account(name)
        cheap = generate_password_hash(user["MLFLOW_TRACKING_PASSWORD"], "pbkdf2:sha256:1")
        self.sql(f"UPDATE users SET password_hash = '{cheap}' WHERE username = '{name}'", self.database)
        return user

    def start(self) -> None:
        path = self.folder / "server.log"
        with path.open("ab") as log:
            self.process = subprocess.Popen(
                [INFRA / "serve.sh"], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: self.process.poll() is not None or status(f"{self.uri}/health") == 200, 300)
        assert self.process.poll() is None, path.read_text()[-3000:]

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """End the server and what it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, by)
            self.process.wait(60)
            self.process = None


def status(url: str, user: dict[str, str] | None = None, body: object = None, **headers: str) -> int:
    """Return the status of a request with or without an account; 0 if the server does not answer."""
    headers = {"Content-Type": "application/json", **{name.title(): value for name, value in headers.items()}}
    if user is not None:
        pair = f"{user['MLFLOW_TRACKING_USERNAME']}:{user['MLFLOW_TRACKING_PASSWORD']}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
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
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
            patch.delenv(name)
        for name, value in (user | {"no_proxy": "127.0.0.1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}).items():
            patch.setenv(name, value)
        yield MlflowClient(user["MLFLOW_TRACKING_URI"])
