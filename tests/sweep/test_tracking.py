"""MLflow shows the ledger as it is: a run a trial, a point once, however often the driver is killed."""

import json
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from sweep.config.files import dump
from sweep.config.paths import trial_folder
from sweep.config.schema import parse
from sweep.search.study import StudyStore
from sweep.tracking.access import tracking_uri
from sweep.tracking.tracker import is_shipped, mlflow_run_id
from tests.conftest import LABELS
from tests.sweep.common import ask, report
from tests.sweep.tracked import CONFIG, DATA, append, curve, runs, shown_params, track


def artifacts(folder: Path, run: Run) -> dict[str, Path]:
    root = folder.parent / "mlartifacts" / CONFIG.name / run.info.run_id / "artifacts"
    return {path.name: path for path in root.rglob("*") if path.is_file()}


def test_a_run_for_the_sweep_and_one_for_each_trial(folder: Path) -> None:
    track(folder)
    parent, children = runs(folder)
    entries = StudyStore.read(folder, CONFIG).trials()
    assert [run.data.tags["sweep.trial"] for run in children] == ["0", "1", "2", "3"]
    assert [run.info.run_id for run in children] == [mlflow_run_id(folder, number) for number in range(4)]
    for run, entry in zip(children, entries, strict=True):
        assert run.data.params == shown_params(entry)
    assert parent.data.params == {}
    assert all(run.data.tags.items() >= DATA.tags().items() for run in (parent, *children))
    rows = [line for line in parent.data.tags["mlflow.note.content"].splitlines() if line.startswith("|")]
    linked = [f"[{run.data.tags['sweep.trial']}](#/experiments/1/runs/{run.info.run_id})" for run in children]
    assert sorted(row.split()[1] for row in rows) == ["#", "---", *linked]


def test_trials_on_folds_are_of_other_splits_and_none_is_the_best_model(folder: Path) -> None:
    points = [{"data.fold": fold} for fold in (0, 1)]
    search = {"space": {"data.fold": [0, 1, 2]}, "points": points, "trials": 2, "pruning": None}
    config = parse({"name": "folds", "train": {"epochs": 1}, "search": search}, "test")
    (own := folder.with_name("folds")).mkdir()
    study = StudyStore.open(own, config)
    ask(study, 2)
    for number in range(2):
        append(own, number)
        (trial_folder(own, number) / "checkpoint.pt").write_bytes(b"weights")
        report(study, number, 0.5)
        study.complete(number)
    track(own, config, corpus=replace(DATA, fingerprint="f00d-0", fold=0))
    parent, children = runs(own)
    told = [(run.data.tags["data.fingerprint"], run.inputs.dataset_inputs[0].dataset.digest) for run in children]
    assert told == [("f00d-0", "f00d-0"), ("f00d-1", "f00d-1")]
    assert parent.data.tags["data.fingerprint"] == "f00d-0"
    assert (is_shipped(own), MlflowClient(tracking_uri(own)).search_registered_models()) == (True, [])


def test_states_are_true_to_life(folder: Path) -> None:
    track(folder)
    parent, children = runs(folder)
    assert [run.info.status for run in children] == ["FINISHED", "KILLED", "FAILED", "SCHEDULED"]
    assert [run.info.end_time is None for run in children] == [False, False, False, True]
    assert [run.data.tags.get("sweep.state") for run in children] == ["COMPLETE", "PRUNED", "FAIL", None]
    assert children[1].data.tags["sweep.why"] == "pruned at epoch 1: 2. of 2 by macro_f1"
    assert (parent.info.status, is_shipped(folder)) == ("SCHEDULED", False)


def test_points_keep_their_steps_and_times(folder: Path) -> None:
    track(folder)
    assert curve(folder, 0) == [(16, 1000.25, 0.5), (32, 1001.5, 0.75)]
    assert curve(folder, 0, "f1") == [(16, 1000.25, 0.5), (32, 1001.5, 0.25)]
    assert curve(folder, 1) == [(16, 1002.0, 0.1)]
    (step, seconds, value), last = curve(folder, 3)
    assert (step, seconds, isnan(value), last) == (16, 1003.0, True, (32, 1004.0, 0.4))


def test_artifacts(folder: Path) -> None:
    track(folder)
    parent, children = runs(folder)
    assert artifacts(folder, parent)["config.yaml"].read_text() == dump(CONFIG)
    found = artifacts(folder, children[0])
    names = {"config.yaml", "confusion_matrix.png", "predictions.json", "response_predictions.json"}
    assert found.keys() == names, "the first task has no prefix, and a text no confusion matrix"
    assert found["config.yaml"].read_text() == "name: trial 0\n", "what ran, as the driver wrote it"
    assert Image.open(found["confusion_matrix.png"]).format == "PNG"
    table = json.loads(found["predictions.json"].read_text())
    assert table["columns"][:5] == ["id", "conversation", "speaker", "label", "prediction"]
    assert [row[0] for row in table["data"]] == ["c/1", "c/3"]
    assert table["columns"][5:] == [f"score {label}" for label in LABELS]
    assert table["data"][0][5:] == [-3.0, -2.0, -1.0]
    replies = json.loads(found["response_predictions.json"].read_text())
    assert replies["data"] == [["c/2", "c", "client", "go on", "tell me more"]]
    [only] = artifacts(folder, children[2]).values()  # it never began: what it would have been
    params = StudyStore.read(folder, CONFIG).trials()[2].params
    assert (only.name, only.read_text()) == ("config.yaml", dump(CONFIG.for_trial(params)))


def finish_sweep(folder: Path) -> None:
    """The running trial goes on: it redoes its last step, at another time and with another value, and ends."""
    append(folder, 3, (32, 2000.0, 0.41), (48, 2001.0, 0.3))
    study = StudyStore.open(folder, CONFIG)
    report(study, 3, 0.95)
    study.complete(3)


@pytest.mark.parametrize("lost", ["nothing", "state", "last state"])
def test_a_second_driver_makes_no_run_and_doubles_no_point(lost: str, folder: Path) -> None:
    track(folder)
    before = [run.info.run_id for run in runs(folder)[1]]
    for path in folder.rglob("mlflow.json") if lost != "nothing" else []:
        state = json.loads(path.read_text())
        path.unlink()
        if lost == "last state" and "offset" in state:  # killed after it sent, before it noted that
            path.write_text(json.dumps({"run_id": state["run_id"]}))
    finish_sweep(folder)
    track(folder)
    parent, children = runs(folder)
    assert [run.info.run_id for run in children] == before
    assert (parent.info.status, children[3].info.status, is_shipped(folder)) == ("FINISHED", "FINISHED", True)
    assert curve(folder, 0) == [(16, 1000.25, 0.5), (32, 1001.5, 0.75)]
    assert curve(folder, 3)[1:] == [(32, 1004.0, 0.4), (48, 2001.0, 0.3)]
    found = artifacts(folder, children[0])
    assert len(json.loads(found["predictions.json"].read_text())["data"]) == 2
    assert len(json.loads(found["response_predictions.json"].read_text())["data"]) == 1


def test_a_finished_sweep_is_left_as_it_is(folder: Path) -> None:
    finish_sweep(folder)
    track(folder)
    before = runs(folder)[1], [curve(folder, number) for number in (0, 1)]
    track(folder)
    after = runs(folder)[1], [curve(folder, number) for number in (0, 1)]
    assert [run.to_dictionary() for run in after[0]] == [run.to_dictionary() for run in before[0]]
    assert (after[1], runs(folder)[0].info.status) == (before[1], "FINISHED")
