"""What travels to a cluster with a job: the packages, whole; no corpus, no run, no credential."""

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ray.dashboard.modules.job.cli import submit

from sweep.cli.submit import job_variables
from tests.sweep.common import sweep

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for package in ("data", "model", "sweep")
    for path in (ROOT / package).rglob("*")
    if path.suffix in (".py", ".yaml", ".j2")
}
PLANTED = """
    .env .env.local .git/config .venv/bin/python auth_token hf_token.txt id_rsa id_ed25519 key.pem client.key
    secrets.yaml my-credentials.yaml .netrc .mlflow/credentials .aws/credentials
    runs/demo/study.journal runs/demo/trials/0000/checkpoint.pt runs/mlflow.db mlruns/0/meta.yaml
    datasets/annomi/train-000.arrow shards/train-000.arrow recordings/1.wav sweep.sif uv.lock build/lib/x.py
    data/id_rsa sweep/token model/.env data/__pycache__/x.pyc infra/k8s/rayjob.yaml tests/conftest.py
""".split()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The packages and ignore files as they are here, among all that a working folder collects."""
    for name in (*SOURCES, ".gitignore", ".rayignore", "pyproject.toml", "infra/runtime_env.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in PLANTED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("s3cret")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    return tmp_path


class JobServer(ThreadingHTTPServer):
    """As much of Ray's job server as a submission needs; keeps what it is sent."""

    package: dict[str, bytes]
    size: int
    job: dict[str, Any]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: JobServer

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        self.answer(*((404, {}) if self.path.startswith("/api/packages") else (200, version)))

    def do_PUT(self) -> None:
        content = self.read()
        with zipfile.ZipFile(io.BytesIO(content)) as package:
            self.server.package = {name: package.read(name) for name in package.namelist() if not name.endswith("/")}
        self.server.size = len(content)
        self.answer(200, {})

    def do_POST(self) -> None:
        self.server.job = json.loads(self.read())
        self.answer(200, {"job_id": "job-1", "submission_id": "job-1"})

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, code: int, content: dict[str, str]) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[JobServer]:
    with JobServer() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield made
        made.shutdown()


def test_manual_job_uploads_sources_and_configurations_only(
    checkout: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- …`, with the environment that
    `sweep submit` gives. Without .rayignore, secrets would be uploaded."""
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def submit_by_hand() -> None:
        options = f"--address {server.address} --working-dir . --runtime-env infra/runtime_env.yaml --no-wait"
        command = "python -m sweep run mine.yaml --out /shared/mine"
        done = CliRunner().invoke(submit, [*options.split(), "--", *command.split()], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    submit_by_hand()
    assert set(server.package) == SOURCES | {"pyproject.toml", "mine.yaml"}
    assert all(server.package[name] == (ROOT / name).read_bytes() for name in SOURCES)
    assert server.size < 2e6
    assert server.job["runtime_env"]["env_vars"] == job_variables()
    (checkout / ".rayignore").unlink()
    submit_by_hand()
    assert {".env", "auth_token", "shards/train-000.arrow", "id_rsa"} <= set(server.package)


def test_submitted_sweep_uploads_its_configuration_only(
    checkout: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    done = sweep("submit", "demo", "--out", "/shared/demo", "--address", server.address, "--no-wait")
    assert done.code == 0, done.err
    assert set(server.package) == SOURCES | {"sweep.yaml"}
    assert "s3cret" not in repr(server.job)
    assert server.size < 2e6
