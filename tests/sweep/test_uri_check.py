"""A tracking URI that can never work is refused before the first trial; an unavailable server is not."""

import http.server
import importlib.util
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.errors import UserError
from sweep.tracking.access import check_access
from sweep.tracking.uri_check import check_uri, fault
from tests.sweep.common import refused


class Page(http.server.BaseHTTPRequestHandler):
    """Answers every request as a web server without MLflow."""

    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(b"<html>It works!</html>")

    def log_message(self, *_: object) -> None:
        """Keep standard error clean."""


@pytest.fixture(params=[200, 404])
def web_server(request: pytest.FixtureRequest) -> Iterator[str]:
    handler = type("Answer", (Page,), {"code": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("./mlruns", "does not write to folders any more"),
        ("file:///tmp/mlruns", "does not write to folders any more"),
        ("uc", "MLflow knows no such address"),
        ("s3://bucket/mlflow", "MLflow knows no such address"),
        ("http://", "names no host"),
        ("http://no-such-host.invalid:5000", "the host no-such-host.invalid is not known here"),
        ("sqlite:///", "names no file"),
        ("sqlite:////proc/none/mlflow.db", "cannot be written"),
        ("sqlite:////dev/null/mlflow.db", "cannot be written"),
        ("mysql+none://host/mlflow", "cannot be read"),
        ("mssql+pyodbc://host/mlflow", "needs the package pyodbc, which is not installed"),
    ],
)
def test_impossible_uri_is_refused(uri: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError) as caught:
        check_uri(uri)
    assert str(caught.value).startswith(f"MLFLOW_TRACKING_URI {uri}: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_databricks_needs_its_package_and_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CONFIG_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/nowhere")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI databricks: no credentials of Databricks"):
        check_access("databricks", "test")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for uri in ("databricks", "databricks://profile"):
        assert "needs the package databricks-sdk" in str(fault(uri))


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "notes.db").write_text("a diary, and no database")
    assert "is not a database of SQLite" in str(fault(f"sqlite:///{file}"))
    assert file.read_text() == "a diary, and no database"


def test_possible_uri_is_accepted_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    uris = [f"sqlite:///{tmp_path}/{name}" for name in ("new.db", "deep/er/new.db", "empty.db")]
    uris += ["postgresql+psycopg://host/mlflow", "http://127.0.0.1:5000", "https://localhost/mlflow"]
    assert [fault(uri) for uri in uris] == [None] * len(uris)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.db"]


def test_web_server_without_mlflow_is_refused(web_server: str) -> None:
    with pytest.raises(UserError, match="this server is not MLflow's") as caught:
        check_access(web_server, "test")
    assert "\n" not in str(caught.value)


def test_unavailable_server_is_a_warning() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        check_access(uri, "test", (lines := list[str]()).append)
    assert lines == [f"MLflow at {uri} does not answer now; the trials start, and their results are sent once it does"]


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_run_and_dry_run_refuse_it_and_write_nothing(
    option: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    assert refused(here, "run", "good.yaml", *option).startswith("MLFLOW_TRACKING_URI ./mlruns: MLflow does not write")
