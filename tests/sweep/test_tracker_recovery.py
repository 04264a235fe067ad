"""MLflow comes back without what it had, or a user deletes some of it: everything is sent again, and once."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from sweep.search.study import StudyStore
from sweep.tracking.access import tracking_uri
from sweep.tracking.summary import is_summary
from sweep.tracking.tracker import is_sent, mlflow_run_id, server_has_all
from tests.sweep.common import report
from tests.sweep.tracked import CONFIG, append, curve, runs, track, written

NUMBERS = range(4)


def end(folder: Path) -> None:
    """Let the running trial end."""
    append(folder, 3, (48, 1005.0, 0.3))
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95)
    study.complete(3)


def database(folder: Path) -> Path:
    return Path(tracking_uri(folder).removeprefix("sqlite:///"))


def shown(folder: Path) -> list[str]:
    """Return all that must not change, as text: NaN is not equal to itself."""

    def row(run: Run) -> str:
        number = int(run.data.tags["sweep.trial"])
        sums = {name: value for name, value in run.data.metrics.items() if is_summary(name)}
        tags = {name: value for name, value in run.data.tags.items() if name.startswith(("sweep.", "data."))}
        return repr((run.info.status, run.data.params, sorted(tags.items()), sums, curve(folder, number)))

    return [row(run) for run in runs(folder)[1]]


def note(parent: Run) -> str:
    """Return the note without links: a run that was created again has another id."""
    return re.sub(r"runs/\w+", "", parent.data.tags["mlflow.note.content"])


@pytest.fixture
def ended(folder: Path) -> Path:
    """The folder of a sweep that is finished, and MLflow has it; beside it is a copy of when trial 3 had two points."""
    shutil.copy(database(folder), folder.parent / "empty.db")
    track(folder)
    shutil.copy(database(folder), folder.parent / "older.db")
    end(folder)
    track(folder)
    assert is_sent(folder)
    assert server_has_all(CONFIG, folder)
    return folder


@pytest.mark.parametrize("copy", ["empty.db", "older.db"])
def test_lost_runs_or_points_are_sent_again(copy: str, ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot be reached counts as one that has everything."""
    before, ids = shown(ended), [mlflow_run_id(ended, number) for number in NUMBERS]
    parent = runs(ended)[0]
    times = [(run.info.start_time, run.info.end_time) for run in runs(ended)[1]]
    shutil.copy(ended.parent / copy, database(ended))
    assert not server_has_all(CONFIG, ended)
    track(ended)
    assert shown(ended) == before
    assert repr([curve(ended, number) for number in NUMBERS]) == repr([written(ended, number) for number in NUMBERS])
    assert (ids == [mlflow_run_id(ended, number) for number in NUMBERS]) == (copy == "older.db")
    assert [(run.info.start_time, run.info.end_time) for run in runs(ended)[1]] == times
    after = runs(ended)[0]
    assert (after.info.status, after.data.params) == ("FINISHED", parent.data.params)
    assert note(after) == note(parent)
    assert (after.data.metrics, after.data.tags["sweep.best_trial"]) == (parent.data.metrics, "3")
    assert all(run.inputs.dataset_inputs for run in (after, *runs(ended)[1]))
    for run in runs(ended)[1]:
        files = {file.path for file in MlflowClient(tracking_uri(ended)).list_artifacts(run.info.run_id)}
        assert "config.yaml" in files
        assert ("predictions.json" in files) == (run.data.tags["sweep.trial"] == "0")
    assert server_has_all(CONFIG, ended)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert server_has_all(CONFIG, ended)


def test_unnoticed_hole_is_filled_when_the_trial_ends(folder: Path) -> None:
    """The database was replaced between two requests, and newer points hide that older ones are gone."""
    track(folder)
    client, run_id = MlflowClient(tracking_uri(folder)), mlflow_run_id(folder, 3)
    shutil.copy(database(folder), copy := folder.parent / "older.db")
    append(folder, 3, (40, 1004.5, 0.35))
    track(folder)
    shutil.copy(copy, database(folder))
    for name, value in (("loss", 0.3), ("f1", 0.7)):
        client.log_metric(run_id, name, value, timestamp=1005000, step=48)
    end(folder)
    state = folder / "trials/0003/mlflow.json"
    content = json.loads(state.read_text())
    size = (folder / "trials/0003/metrics.jsonl").stat().st_size
    state.write_text(json.dumps({**content, "offset": size, "highest": {"loss": 48, "f1": 48}}))
    assert [step for step, *_ in curve(folder, 3)] == [16, 32, 48], "the hole"
    track(folder)
    assert [step for step, *_ in curve(folder, 3)] == [16, 32, 40, 48]
    assert [step for step, *_ in curve(folder, 3, "f1")] == [16, 32, 40, 48]


def test_changes_in_the_ui_lose_and_add_no_run(ended: Path) -> None:
    client, before, ids = MlflowClient(tracking_uri(ended)), shown(ended), [run.info.run_id for run in runs(ended)[1]]
    first = client.get_run(ids[0])
    experiment = first.info.experiment_id
    tags = {name: first.data.tags[name] for name in ("sweep.key", "sweep.trial", "mlflow.parentRunId")}
    changes: tuple[Callable[[], object], ...] = (
        lambda: client.delete_run(ids[0]),
        lambda: client.delete_run(runs(ended)[0].info.run_id),
        lambda: client.create_run(experiment, first.info.start_time + 5000, tags),  # a second run of trial 0
        lambda: client.delete_experiment(experiment),
        lambda: client.rename_experiment(experiment, "another name"),
    )
    for change in changes:
        change()
        track(ended)
        assert shown(ended) == before
        assert [run.info.run_id for run in runs(ended)[1]] == ids
        assert runs(ended)[0].info.status == "FINISHED"


def test_running_trial_gets_lost_points_at_once(folder: Path) -> None:
    track(folder)
    shutil.copy(database(folder), copy := folder.parent / "older.db")
    append(folder, 3, (48, 1005.0, 0.3))
    track(folder)
    shutil.copy(copy, database(folder))
    assert len(curve(folder, 3)) == 2
    track(folder)
    assert repr(curve(folder, 3)) == repr(written(folder, 3))
    assert runs(folder)[1][3].info.status == "SCHEDULED"


def test_repeated_steps_after_a_restore_are_not_doubled(folder: Path) -> None:
    """The trial's folder is an older copy: the trial repeats what MLflow has already, at another time."""
    path = folder / "trials/0003/metrics.jsonl"
    older = path.read_bytes()
    append(folder, 3, (48, 1005.0, 0.3))
    track(folder)
    path.write_bytes(older)
    track(folder)
    append(folder, 3, (48, 2005.0, 0.3), (64, 2006.0, 0.2))
    track(folder)
    assert curve(folder, 3)[1:] == [(32, 1004.0, 0.4), (48, 1005.0, 0.3), (64, 2006.0, 0.2)]
