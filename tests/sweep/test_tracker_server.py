"""The tracker beside a sweep: trials write, the server is unavailable or fails, the sweep grows; no secrets."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sweep.config.paths import trial_folder
from sweep.search.study import StudyStore
from sweep.tracking.access import tracking_uri, ui_command
from sweep.tracking.tracker import Tracker, is_sent, mlflow_run_id
from tests.sweep.common import ask, report
from tests.sweep.tracked import CONFIG, DATA, append, curve, runs, shown_params, track

SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def lines() -> list[str]:
    """Lines that the trackers of a test show to the user."""
    return []


@pytest.fixture
def begin(lines: list[str]) -> Iterator[Any]:
    """Start a tracker; none outlives its test."""
    started: list[Tracker] = []

    def tracker(folder: Path, every: float) -> Tracker:
        started.append(Tracker(CONFIG, folder, DATA, every, lines.append))
        started[-1].start()
        return started[-1]

    yield tracker
    for each in started:
        stop(each)


def stop(tracker: Tracker) -> None:
    """End a tracker that may be retrying."""
    tracker._connect = sys.exit
    tracker.ended.set()
    tracker.join(10)
    assert not tracker.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.05)


def test_points_arrive_while_a_trial_runs(begin: Any, folder: Path) -> None:
    tracker = begin(folder, 0.02)
    wait_for(lambda: mlflow_run_id(folder, 3) is not None and len(curve(folder, 3)) == 2)
    append(folder, 3, (48, 1005.0, 0.3))
    wait_for(lambda: len(curve(folder, 3)) == 3)
    wait_for(lambda: runs(folder)[1][3].info.status == "RUNNING")
    assert runs(folder)[0].info.status == "RUNNING"
    assert tracker.is_alive()
    assert tracker.finish(60)
    parent, children = runs(folder)
    assert (parent.info.status, children[3].info.status) == ("SCHEDULED", "SCHEDULED")
    assert not tracker.is_alive()


def test_half_line_is_sent_once_complete(folder: Path) -> None:
    line = json.dumps({"time": 1005.0, "step": 48, "values": {"loss": 0.25}}) + "\n"
    path = trial_folder(folder, 3) / "metrics.jsonl"
    for part, points in ((line[:30], 2), (line[30:-1], 2), (line[-1], 3)):
        with path.open("a") as file:
            file.write(part)
        track(folder)
        assert len(curve(folder, 3)) == points, part
    assert curve(folder, 3)[2] == (48, 1005.0, 0.25)


def test_unavailable_server_is_reported_once(
    begin: Any, lines: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = begin(folder, 0.05)
    wait_for(lambda: bool(lines))
    assert lines == [f"MLflow is unavailable; metrics are buffered and will be retried ({tracker.error})"]
    started = time.monotonic()
    assert tracker.finish(0.2) is False
    assert time.monotonic() - started < 5
    assert tracker.error is not None
    assert "127.0.0.1" in tracker.error
    assert len(tracker.error.splitlines()) == 1
    assert (mlflow_run_id(folder, 0), is_sent(folder)) == (None, False)
    stop(tracker)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    track(folder)
    assert [len(curve(folder, number)) for number in (0, 1, 3)] == [2, 1, 2]


def test_failing_requests_double_nothing(
    begin: Any, lines: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request of each kind is lost: for half of the kinds after the server has done its part."""
    seen: set[tuple[str, ...]] = set()

    def flaky(name: str, after: bool) -> None:
        original = getattr(MlflowClient, name)

        def call(self: MlflowClient, *args: object, **kwargs: object) -> object:
            key = (name, *sorted(kwargs))
            first, _ = key not in seen, seen.add(key)
            result = original(self, *args, **kwargs) if after or not first else None
            if first:
                raise ConnectionError(name)
            return result

        monkeypatch.setattr(MlflowClient, name, call)

    for place, name in enumerate(("create_run", "log_batch", "log_text", "log_image", "log_inputs", "set_terminated")):
        flaky(name, after=place < 3)
    tracker = begin(folder, 0.001)
    assert tracker.finish(60), tracker.error
    assert lines[-1] == "MLflow is available again and has all results"
    assert {name for name, *_ in seen} == {
        "create_run",
        "log_batch",
        "log_text",
        "log_image",
        "log_inputs",
        "set_terminated",
    }
    _, children = runs(folder)
    assert [run.info.status for run in children] == ["FINISHED", "KILLED", "FAILED", "SCHEDULED"]
    assert curve(folder, 0) == [(16, 1000.25, 0.5), (32, 1001.5, 0.75)]
    assert children[0].data.params == shown_params(StudyStore.read(folder, CONFIG).trials()[0])


def test_refused_trial_does_not_stop_the_others(begin: Any, folder: Path) -> None:
    path = trial_folder(folder, 0) / "metrics.jsonl"
    path.write_text(json.dumps({"time": 1.0, "step": 1, "values": {"no | name": 1.0}}) + "\n" + path.read_text())
    tracker = begin(folder, 0.02)
    assert tracker.finish(0) is False
    wait_for(lambda: "no | name" in str(tracker.error) and runs(folder)[1][3].info.status == "SCHEDULED")
    _, children = runs(folder)
    assert [run.info.status for run in children] == ["RUNNING", "KILLED", "FAILED", "SCHEDULED"]
    assert is_sent(folder) is False


def test_extended_sweep_gets_more_runs(folder: Path) -> None:
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95)
    study.complete(3)
    track(folder)
    first, before = runs(folder)
    assert (first.info.status, is_sent(folder)) == ("FINISHED", True)
    more = CONFIG.with_values({"search.trials": 5})
    ask(study := StudyStore.open(folder, more), 1)
    track(folder, more)
    assert (runs(folder)[0].info.status, is_sent(folder)) == ("SCHEDULED", False)
    study.fail(4, "lost")
    track(folder, more)
    parent, after = runs(folder)
    assert parent.info.run_id == first.info.run_id
    assert (parent.info.status, is_sent(folder)) == ("FINISHED", True)
    assert [run.to_dictionary() for run in after[:4]] == [run.to_dictionary() for run in before]
    assert after[4].info.status == "FAILED"


def test_secrets_are_not_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, f"very-{name.lower()}-indeed")
    track(folder)
    content = b"".join(path.read_bytes() for path in folder.parent.rglob("*") if path.is_file())
    assert CONFIG.name.encode() in content
    assert b"macro_f1" in content
    assert [name for name in SECRETS if os.environ[name].encode() in content] == []


def test_tracking_uri_and_ui_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("runs/a")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert "mlflow server --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1" in ui_command(Path("runs/a"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert (tracking_uri(Path("runs/a")), ui_command(Path("runs/a"))) == (
        "http://server:5000",
        "http://server:5000",
    )
