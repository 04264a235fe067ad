"""A real MLflow server is killed -9 while a sweep ships to it, three times, and comes back: with its database, with an
older copy of it, and with nothing. Afterwards it shows what the trials wrote, each point once."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweep.search.study import StudyStore
from sweep.tracking.access import tracking_uri
from sweep.tracking.tracker import Tracker, is_sent, mlflow_run_id
from tests.sweep.common import report
from tests.sweep.mlflow_server import Server, wait_for
from tests.sweep.tracked import CONFIG, DATA, append, curve, runs, shown_params, written

# What tests/infra/test_mlflow_server.py does in every run, with one kill.
pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]


def test_killed_server_that_lost_data_gets_it_again(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("sweep.tracking.tracker.MAX_WAIT", 0.5)
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
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95)
    study.complete(3)
    assert tracker.finish(180), tracker.error
    check(folder)
    assert capsys.readouterr().out == "", "standard output is the command line's"


def check(folder: Path) -> None:
    """Check that MLflow shows the study and the metrics logs, point by point."""
    parent, children = runs(folder)
    trials = StudyStore.read(folder, CONFIG).trials()
    assert (parent.info.status, is_sent(folder)) == ("FINISHED", True)
    assert [run.info.status for run in children] == ["FINISHED", "KILLED", "FAILED", "FINISHED"]
    for record, run in zip(trials, children, strict=True):
        assert run.data.params == shown_params(record)
        for name in ("loss", "f1"):
            assert repr(curve(folder, record.number, name)) == repr(written(folder, record.number, name))
        files = {file.path for file in MlflowClient(tracking_uri(folder)).list_artifacts(run.info.run_id)}
        assert files >= (
            {"config.yaml", "confusion_matrix.png", "predictions.json"} if record.number == 0 else {"config.yaml"}
        )
