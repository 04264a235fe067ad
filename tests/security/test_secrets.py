"""Secrets lie in the environment and nowhere else: not in a sweep's files, MLflow, shards, logs, nor what travels."""

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus

from data.corpus import synthetic
from data.errors import ConfigError, UserError
from data.preparation.build import prepare
from sweep.cli.submit import stage, start
from sweep.config.schema import parse
from sweep.tracking.access import tracking_uri
from tests.sweep.common import settings, sweep
from tests.sweep.test_submit import Client

NAMES = """MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN HF_TOKEN AWS_ACCESS_KEY_ID
    AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN PGPASSWORD RAY_AUTH_TOKEN""".split()
# The command, without deleting what it would: Ray's folder, and that of Tune and Train.
COMMAND = """
from types import SimpleNamespace
from sweep import runner
from sweep.cli.app import main
from sweep.execution import orphans
orphans.shutil = runner.shutil = SimpleNamespace(rmtree=lambda path, **_: print("kept", path, flush=True))
main()
"""


@pytest.fixture(scope="module")
def planted() -> dict[str, str]:
    return {name: secrets.token_hex(16) for name in NAMES}


def found_in(paths: list[Path], planted: dict[str, str]) -> list[str]:
    contents = ((path, path.read_bytes()) for path in paths)
    return [f"{name} in {path}" for path, text in contents for name, value in planted.items() if value.encode() in text]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_writes_no_secret_anywhere(planted: dict[str, str], models: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment |= planted | {"SWEEP_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}
    shards = prepare(synthetic.corpus(sessions=6, turns=6, seed=5), tmp_path / "shards")
    content = {
        "name": "tiny",
        "data": {"shards": str(shards.folder), "history": 1},
        "model": {"modality": "text", "llm": {"path": str(models / "llm")}},
        "train": {"epochs": 1, "batch_size": 8},
        "search": {"trials": 1, "pruning": None, "space": {"model.lora.rank": [2]}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    words = [sys.executable, "-c", COMMAND, "run", tmp_path / "tiny.yaml", "--out", tmp_path / "runs/tiny"]
    done = subprocess.run(
        [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    said = done.stdout + done.stderr
    kept = {Path(line.removeprefix("kept ")) for line in said.splitlines() if line.startswith("kept ")}
    ray = [path for path in kept if path.name.startswith("sweep-ray-")]
    try:
        assert done.returncode == 0, said[-3000:]
        written = [*files(tmp_path), *(path for folder in ray for path in files(folder))]
        names = {path.name for path in written}
        looked_for = {"mlflow.db", "study.journal", "config.yaml", "checkpoint.pt", "predictions.json", "metrics.jsonl"}
        assert names >= looked_for | {"manifest.json", "gcs_server.out", "raylet.out", "dashboard.log"}
        assert found_in(written, planted) == []
        assert [name for name, value in planted.items() if value in said] == []
    finally:
        for folder in ray:
            shutil.rmtree(folder, ignore_errors=True)


def test_no_secret_travels_with_a_job(planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    client = Client(JobStatus.SUCCEEDED, 0)
    stage(settings(), tmp_path)
    start(client, settings(), tmp_path, Path("/shared/run"))
    assert found_in(files(tmp_path), planted) == []
    assert [name for name, value in planted.items() if value in repr(client.job)] == []


def test_a_folder_with_spaces_is_one_word_of_the_jobs_command(tmp_path: Path) -> None:
    """A shell reads it."""
    client = Client(JobStatus.SUCCEEDED, 0)
    start(client, settings(), tmp_path, Path("/shared/my run; true"))
    assert client.job["entrypoint"].endswith("--out '/shared/my run; true'")


@pytest.mark.parametrize(
    "uri", ["http://me:s3cret@server:5000", "https://s3cret@server", "postgresql://me:s3cret@host/db"]
)
def test_a_password_in_the_address_of_mlflow_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own errors name the whole address, and those are shown."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="take it out, and set MLFLOW_TRACKING_USERNAME"):
        tracking_uri(tmp_path)
    outcome = sweep("run", "demo", "--out", tmp_path / "run")
    assert (outcome.code, "s3cret" in outcome.out + outcome.err) == (2, False)
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_names_its_user_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me@host/db")
    assert tracking_uri(tmp_path) == "postgresql://me@host/db"


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:s3cret@bucket/x",
        "s3://bucket/x?secret_key=s3cret",
        "abfs://c/x?sas_token=s3cret",
        "s3://b/x?Key=s3cret",
    ],
)
@pytest.mark.parametrize("key", ["storage.mirror", "data.shards"])
def test_a_password_in_the_address_of_a_store_is_refused_before_anything_is_written(
    key: str, url: str, tmp_path: Path
) -> None:
    section, name = key.split(".")
    tree: dict[str, Any] = {"name": "a", section: {name: url}}
    with pytest.raises(ConfigError, match=rf"{key}: .*a URL must not hold credentials") as error:
        parse(tree, "a.yaml")
    assert "s3cret" not in str(error.value)
    outcome = sweep("submit", "demo", "--set", f"{key}={url}", "--out", tmp_path / "run")
    assert (outcome.code, "s3cret" in outcome.out + outcome.err) == (2, False)
