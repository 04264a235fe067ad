"""Secrets stay in the environment: nothing that is uploaded or written holds one.

The README's sweep runs with planted secrets, too, see tests/test_readme.py.
"""

from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from data.errors import ConfigError, UserError
from sweep.cli.submit import stage, start
from sweep.config.schema import parse
from sweep.tracking.access import tracking_uri
from tests.security.planted import files, found_in, plant
from tests.sweep.common import settings, sweep
from tests.sweep.test_submit import Client


def test_no_secret_travels_with_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (planted := plant()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    client = Client(JobStatus.SUCCEEDED, 0)
    stage(settings(), tmp_path)
    start(client, settings(), tmp_path, Path("/shared/my run; true"))
    assert client.job["entrypoint"].endswith("--out '/shared/my run; true'")  # a shell reads it
    assert found_in(files(tmp_path), planted) == []
    assert [name for name, value in planted.items() if value in repr(client.job)] == []


@pytest.mark.parametrize(
    "uri", ["http://me:s3cret@server:5000", "https://s3cret@server", "postgresql://me:s3cret@host/db"]
)
def test_password_in_mlflows_address_is_refused(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own errors name the whole address, and those are shown."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="remove it, and set MLFLOW_TRACKING_USERNAME"):
        tracking_uri(tmp_path)
    outcome = sweep("run", "demo", "--out", tmp_path / "run")
    assert (outcome.code, "s3cret" in outcome.out + outcome.err) == (2, False)
    assert list(tmp_path.iterdir()) == []


def test_user_in_a_databases_address_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me@host/db")
    assert tracking_uri(tmp_path) == "postgresql://me@host/db"


URLS = "s3://key:s3cret@bucket/x s3://bucket/x?secret_key=s3cret abfs://c/x?sas_token=s3cret s3://b/x?Key=s3cret"


@pytest.mark.parametrize("url", URLS.split())
@pytest.mark.parametrize("key", ["storage.mirror", "data.shards"])
def test_password_in_a_store_url_is_refused(key: str, url: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    tree: dict[str, Any] = {"name": "a", section: {name: url}}
    with pytest.raises(ConfigError, match=rf"{key}: .*a URL must not contain credentials") as error:
        parse(tree, "a.yaml")
    assert "s3cret" not in str(error.value)
    outcome = sweep("submit", "demo", "--set", f"{key}={url}", "--out", tmp_path / "run")
    assert (outcome.code, "s3cret" in outcome.out + outcome.err) == (2, False)
