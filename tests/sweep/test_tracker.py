"""MLflow shows the study as it is: one run per trial, each point once, however often the driver is killed."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2
from PIL import Image

from sweep.analysis.predictions import INTERVALS
from sweep.config.files import dump
from sweep.config.paths import trial_folder
from sweep.config.schema import parse
from sweep.config.version import code_version
from sweep.search.study import StudyStore
from sweep.search.study_storage import sweep_id
from sweep.tracking.access import tracking_uri
from sweep.tracking.runs import Runs
from sweep.tracking.summary import is_summary
from sweep.tracking.tracker import is_sent, mlflow_run_id, view_links
from sweep.tracking.views import TAG, save_view
from tests.conftest import LABELS
from tests.sweep.common import ask, report, sweep
from tests.sweep.tracked import CONFIG, DATA, append, curve, make_sweep, runs, shown_params, track


@pytest.fixture(scope="module")
def sent(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a sweep that was sent once; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        track(folder := make_sweep(tmp_path_factory.mktemp("sent") / "sweep", database))
        yield folder


def artifacts(folder: Path, run: Run) -> dict[str, Path]:
    root = folder.parent / "mlartifacts" / CONFIG.name / run.info.run_id / "artifacts"
    return {path.name: path for path in root.rglob("*") if path.is_file()}


def summary_metrics(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.data.metrics.items() if is_summary(name)}


def test_sweep_and_each_trial_have_a_run(sent: Path) -> None:
    parent, children = runs(sent)
    trials = StudyStore.read(sent, CONFIG).trials()
    assert [run.data.tags["sweep.trial"] for run in children] == ["0", "1", "2", "3"]
    assert [run.info.run_id for run in children] == [mlflow_run_id(sent, number) for number in range(4)]
    for run, trial in zip(children, trials, strict=True):
        assert run.data.params == shown_params(trial)
    assert parent.data.params == {}
    for run in (parent, *children):
        assert run.data.tags.items() >= DATA.tags().items()
        [dataset] = run.inputs.dataset_inputs
        assert dataset.to_dictionary() == DATA.input().to_dictionary()
    rows = [line for line in parent.data.tags["mlflow.note.content"].splitlines() if line.startswith("|")]
    linked = [f"[{run.data.tags['sweep.trial']}](#/experiments/1/runs/{run.info.run_id})" for run in children]
    assert sorted(row.split()[1] for row in rows) == ["#", "---", *linked]


def test_statuses_follow_the_states_of_trials(sent: Path) -> None:
    parent, children = runs(sent)
    assert [run.info.status for run in children] == ["FINISHED", "KILLED", "FAILED", "SCHEDULED"]
    assert [run.info.end_time is None for run in children] == [False, False, False, True]
    assert [run.data.tags.get("sweep.state") for run in children] == ["COMPLETE", "PRUNED", "FAIL", None]
    assert children[1].data.tags["sweep.why"] == "pruned at epoch 1: ranked 2nd of 2 by macro_f1"
    assert (parent.info.status, is_sent(sent)) == ("SCHEDULED", False)


def test_points_keep_their_steps_and_times(sent: Path) -> None:
    assert curve(sent, 0) == [(16, 1000.25, 0.5), (32, 1001.5, 0.75)]
    assert curve(sent, 0, "f1") == [(16, 1000.25, 0.5), (32, 1001.5, 0.25)]
    assert curve(sent, 1) == [(16, 1002.0, 0.1)]
    (step, seconds, value), last = curve(sent, 3)
    assert (step, seconds, isnan(value), last) == (16, 1003.0, True, (32, 1004.0, 0.4))


def test_view_shows_the_trials_of_the_sweep(sent: Path) -> None:
    """As the UI reads it: a saved view by its name, and the plain fields for older servers."""
    parent, _ = runs(sent)
    experiment, key = parent.info.experiment_id, sweep_id(sent)
    saved = json.loads(MlflowClient(tracking_uri(sent)).get_experiment(experiment).tags[f"{TAG}{key}"])
    fields = json.loads(saved["state"])
    assert saved["name"] == "test: trials by macro_f1"
    assert saved.items() >= fields.items()
    assert fields["searchFilter"] == f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    assert (fields["orderByKey"], fields["orderByAsc"]) == ("metrics.`objective`", False)
    columns = ["metrics.`objective`", "metrics.`objective_lower`", "metrics.`objective_upper`"]
    assert fields["selectedColumns"] == columns + [f"params.`{key}`" for key in CONFIG.search.space]
    drawn = [(chart["type"], chart.get("xaxis", {}).get("key")) for chart in fields["compareRunCharts"]]
    scatters = [("SCATTER", "model.lora.rank"), ("SCATTER", "train.learning_rate")]
    assert drawn == [("PARALLEL", None), ("BAR", None), ("LINE", None), *scatters]


def test_links_to_the_view_are_shown(sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    parent, _ = runs(sent)
    trials = f"#/experiments/{parent.info.experiment_id}/runs?viewStateShareKey={sweep_id(sent)}"
    assert view_links(sent) == (trials, f"{trials}&compareRunsMode=CHART")
    assert trials in parent.data.tags["mlflow.note.content"]
    shutil.copytree(sent, folder := tmp_path / "sweep")
    (folder / "config.yaml").write_text(dump(CONFIG), encoding="utf-8")
    assert f"trials:     http://127.0.0.1:5000/{trials}\n" in sweep("status", folder).out
    (folder / "mlflow.json").write_text(json.dumps({"run_id": parent.info.run_id, "ended": True}))
    assert view_links(folder) is None, "as an older version left it"


@pytest.mark.parametrize("code", ["INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"])
def test_view_that_a_server_refuses_is_left_out(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("no", databricks_pb2.ErrorCode.Value(code))

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    save_view(Runs("http://127.0.0.1:1", "key"), CONFIG, "parent")


def test_intervals_are_stored_when_a_trial_ends(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.tracking.tracker.note", lambda *_: "")  # which would store them at the sweep's end
    track(folder := make_sweep(tmp_path / "sweep", database))
    assert "macro_f1" in json.loads((trial_folder(folder, 0) / INTERVALS).read_text())["intervals"]


def test_artifacts_of_trials_are_logged(sent: Path) -> None:
    parent, children = runs(sent)
    assert artifacts(sent, parent)["config.yaml"].read_text() == dump(CONFIG)
    files = artifacts(sent, children[0])
    names = {"config.yaml", "confusion_matrix.png", "predictions.json", "response_predictions.json"}
    assert files.keys() == names, "the first task has no prefix, and a text no confusion matrix"
    assert files["config.yaml"].read_text() == "name: trial 0\n", "as the driver wrote it"
    assert Image.open(files["confusion_matrix.png"]).format == "PNG"
    table = json.loads(files["predictions.json"].read_text())
    assert table["columns"][:5] == ["id", "conversation", "speaker", "label", "prediction"]
    assert [row[0] for row in table["data"]] == ["c/1", "c/3"]
    assert table["columns"][5:] == [f"score {label}" for label in LABELS]
    assert table["data"][0][5:] == [-3.0, -2.0, -1.0]
    replies = json.loads(files["response_predictions.json"].read_text())
    assert replies["data"] == [["c/2", "c", "client", "go on", "tell me more"]]
    [only] = artifacts(sent, children[2]).values()  # the trial never began: its configuration is computed
    params = StudyStore.read(sent, CONFIG).trials()[2].params
    assert (only.name, only.read_text()) == ("config.yaml", dump(CONFIG.for_trial(params)))


def test_runs_can_be_sorted_and_filtered(sent: Path) -> None:
    parent, children = runs(sent)
    assert [summary_metrics(run) for run in children] == [
        {"best_macro_f1": 0.9, "best_loss": 0.5, "objective": 0.8},
        {"best_macro_f1": 0.1, "best_loss": 0.1, "objective": 0.1},
        {},  # failed before it began
        {},  # has not ended
    ]
    assert summary_metrics(parent) == {"best_macro_f1": 0.8, "best_trial": 0.0}
    best = {"sweep.best_trial": "0", "sweep.best_run": children[0].info.run_id, "sweep.code": code_version()}
    assert parent.data.tags.items() >= best.items()
    first = {"sweep.state": "COMPLETE", "sweep.rung": "2", "sweep.seed": "0", "sweep.code": code_version()}
    assert children[0].data.tags.items() >= first.items()
    assert (children[1].data.tags["sweep.rung"], children[2].data.tags["sweep.reason"]) == ("1", "error")
    client, ids = MlflowClient(tracking_uri(sent)), [parent.info.experiment_id]
    ranked = client.search_runs(ids, "attributes.status = 'FINISHED'", order_by=["metrics.objective DESC"])
    assert ranked[0].info.run_id == children[0].info.run_id
    pruned = client.search_runs(ids, "tags.`sweep.state` = 'PRUNED'")
    assert [run.info.run_id for run in pruned] == [children[1].info.run_id]


def test_folds_are_other_splits_and_publish_no_model(folder: Path) -> None:
    points = [{"data.fold": fold} for fold in (0, 1)]
    search = {"space": {"data.fold": [0, 1, 2]}, "points": points, "trials": 2, "pruning": None}
    config = parse({"name": "folds", "train": {"epochs": 1}, "search": search}, "test")
    (folds := folder.with_name("folds")).mkdir()
    study = StudyStore.open(folds, config)
    ask(study, 2)
    for number in range(2):
        append(folds, number)
        (trial_folder(folds, number) / "checkpoint.pt").write_bytes(b"weights")
        report(study, number, 0.5)
        study.complete(number)
    track(folds, config, corpus=replace(DATA, fingerprint="f00d-0", fold=0))
    parent, children = runs(folds)
    ids = [(run.data.tags["data.fingerprint"], run.inputs.dataset_inputs[0].dataset.digest) for run in children]
    assert ids == [("f00d-0", "f00d-0"), ("f00d-1", "f00d-1")]
    assert parent.data.tags["data.fingerprint"] == "f00d-0"
    assert (is_sent(folds), MlflowClient(tracking_uri(folds)).search_registered_models()) == (True, [])


def finish_sweep(folder: Path) -> None:
    """Resume the running trial: it repeats its last step at another time and with another value, and ends."""
    append(folder, 3, (32, 2000.0, 0.41), (48, 2001.0, 0.3))
    study = StudyStore.open(folder, CONFIG)
    report(study, 3, 0.95)
    study.complete(3)


@pytest.mark.parametrize("lost", ["nothing", "state", "last state"])
def test_second_driver_creates_no_run_and_no_point(lost: str, folder: Path) -> None:
    track(folder)
    before = [run.info.run_id for run in runs(folder)[1]]
    for path in folder.rglob("mlflow.json") if lost != "nothing" else []:
        state = json.loads(path.read_text())
        path.unlink()
        if lost == "last state" and "offset" in state:  # killed after it sent and before it stored that
            path.write_text(json.dumps({"run_id": state["run_id"]}))
    finish_sweep(folder)
    track(folder)
    parent, children = runs(folder)
    assert [run.info.run_id for run in children] == before
    assert (parent.info.status, children[3].info.status, is_sent(folder)) == ("FINISHED", "FINISHED", True)
    assert curve(folder, 0) == [(16, 1000.25, 0.5), (32, 1001.5, 0.75)]
    assert curve(folder, 3)[1:] == [(32, 1004.0, 0.4), (48, 2001.0, 0.3)]
    files = artifacts(folder, children[0])
    assert len(json.loads(files["predictions.json"].read_text())["data"]) == 2
    assert len(json.loads(files["response_predictions.json"].read_text())["data"]) == 1


def test_finished_sweep_is_not_changed(folder: Path) -> None:
    finish_sweep(folder)
    track(folder)
    before = runs(folder)[1], [curve(folder, number) for number in (0, 1)]
    track(folder)
    after = runs(folder)[1], [curve(folder, number) for number in (0, 1)]
    assert [run.to_dictionary() for run in after[0]] == [run.to_dictionary() for run in before[0]]
    assert (after[1], runs(folder)[0].info.status) == (before[1], "FINISHED")


def test_summary_follows_the_trials_and_is_sent_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tags also name every version of the code that ran a trial."""
    track(folder)
    monkeypatch.setattr("sweep.tracking.tracker.code_version", lambda: "2+changed")
    track(folder)
    assert [run.data.tags["sweep.code"] for run in runs(folder)[1]] == [
        *[code_version()] * 3,
        f"{code_version()}, 2+changed",
    ]
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95)
    study.complete(3)
    track(folder)
    parent, children = runs(folder)
    client = MlflowClient(tracking_uri(folder))
    history = [client.get_metric_history(parent.info.run_id, name) for name in ("best_macro_f1", "best_trial")]
    assert [[(point.step, point.value) for point in points] for points in history] == [
        [(3, 0.8), (4, 0.95)],
        [(3, 0.0), (4, 3.0)],
    ]
    assert parent.data.tags["sweep.best_run"] == children[3].info.run_id
    for run in children:
        for name in summary_metrics(run):
            assert len(client.get_metric_history(run.info.run_id, name)) == 1
