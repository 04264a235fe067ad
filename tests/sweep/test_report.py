"""`sweep report`: what it says of a finished sweep, and of empty, failed, single, running and confirmed ones."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from markupsafe import escape
from mlflow import MlflowClient

from sweep.analysis import confirm
from sweep.analysis.evaluate import SplitPredictions
from sweep.analysis.report import ablation, figures
from sweep.analysis.report import page as report_page
from sweep.cli import results as cli_confirm
from sweep.config.diff import claim_folder
from sweep.config.paths import trial_folder
from sweep.search.study import StudyStore
from sweep.tracking.report_artifacts import to_mlflow
from tests.conftest import LABELS
from tests.sweep.common import complaint, sweep
from tests.sweep.searched import REFERENCE, TEXT, played, said, settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    played(settings(trials=10, startup_trials=6), folder := tmp_path_factory.mktemp("report") / "played")
    return folder


def page(folder: Path, *args: object) -> str:
    """The page of a sweep, without plotly and the pictures."""
    outcome = sweep("report", folder, *args)
    assert (outcome.code, outcome.err) == (0, "")
    text = (folder / "report" / "report.html").read_text()
    return re.sub(r"(?s)<script.*?</script>|<wbr>", "", text)


def test_a_finished_sweep(finished: Path) -> None:
    text = page(finished)
    best = StudyStore.read(finished, settings(trials=10)).best()
    assert best is not None
    assert f"best in the search: trial {best.number}, macro_f1 {best.value:.3f} [" in text
    assert "tied within noise" in text
    assert "this is the luckiest of 10 trials" in text
    assert text.count("CPU-hours</td>") == 10
    for title in ("How sure the order is", "Does it listen?", "Learning curves", "What mattered", "rank with learning"):
        assert f"<h3>{title}" in text
    names = {path.name for path in (finished / "report").iterdir()}
    tables, drawn = {"ablation.md", "ablation.tex", "ablation.csv"}, {"history.png", "importance.png", "slices.png"}
    assert names >= tables | drawn | {"report.html"}


def test_the_page_and_the_terminal_say_the_same(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, verdict = [], report_page.find_verdict
    monkeypatch.setattr(report_page, "find_verdict", lambda *args: asked.append(args) or verdict(*args))
    outcome = sweep("report", finished)
    text = (finished / "report" / "report.html").read_text()
    said = outcome.out.split("\nin MLflow: ")[0].splitlines()
    assert (len(asked), len(said) > 3) == (1, True)
    assert all(f"<p>{escape(line)}</p>" in text for line in said)
    assert not list((finished / "report").glob("*.unfinished*"))


def test_the_page_needs_nothing_from_outside(finished: Path) -> None:
    page(finished)
    text = (finished / "report" / "report.html").read_text()
    assert "Plotly.newPlot" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)


def test_the_ablation_is_paired_and_holds_one_choice_at_a_time(finished: Path) -> None:
    text = page(finished)
    assert "The reference: trial 0 (modality speech, rank 8, learning_rate 1.00e-03, end_of_audio none)." in text
    table = pd.read_csv(finished / "report" / "ablation.csv").set_index("choice")
    assert table.loc["modality: speech → text", "verdict"] == "worse"
    assert table.loc["rank: 8 → 16", "verdict"] == "tied within noise"
    assert table.loc["end_of_audio: none → learned", "difference"] == 0.0
    low, high = map(float, table.loc["modality: speech → text", "95 % interval"].strip("[]").split(","))
    assert low < table.loc["modality: speech → text", "difference"] < high < 0
    tex = (finished / "report" / "ablation.tex").read_text()
    assert r"modality: speech $\rightarrow$ text" in tex
    assert r"macro\_f1" in tex
    assert "| reference " in (finished / "report" / "ablation.md").read_text()


def test_another_reference(finished: Path) -> None:
    page(finished, "--reference", 1)
    table = pd.read_csv(finished / "report" / "ablation.csv").set_index("choice")
    assert set(table.loc[["modality: text → speech"], "verdict"]) == {"better"}
    assert "complete are" in complaint(sweep("report", finished, "--reference", 99))


def test_importances_are_of_choices_that_all_trials_have(finished: Path) -> None:
    """Those of text trials are not left out because text has no end of audio."""
    study = figures.in_memory_study(StudyStore.read(finished, settings(trials=10)))
    assert figures.common_params(study) == ["learning_rate", "modality", "rank"]
    assert {trial.params["modality"] for trial in study.trials} == {"speech", "text"}


def test_no_trial_yet(tmp_path: Path) -> None:
    claim_folder(settings(), folder := tmp_path / "empty")
    StudyStore.open(folder, settings())
    text = page(folder)
    assert "No trial is complete" in text
    assert "There is nothing to draw yet" in text


def test_all_failed(tmp_path: Path) -> None:
    claim_folder(settings(), folder := tmp_path / "failed")
    study = StudyStore.open(folder, settings())
    for number in range(2):
        study.ask([], 9)
        study.fail(number, "non-finite loss at step 840, learning rate 9e-3 <b>", "non-finite")
    text = page(folder)
    assert "non-finite loss at step 840, learning rate 9e-3 &lt;b&gt;" in text
    assert "<b>" not in text


def test_a_single_trial_and_one_that_runs(tmp_path: Path) -> None:
    played(settings(trials=1), folder := tmp_path / "single")
    study = StudyStore.open(folder, settings(trials=2))
    study.ask([], 2)
    text = page(folder)
    assert "best in the search: trial 0" in text
    assert "1 complete, 1 running" in text
    assert "No complete trial differs from the reference" in text


def test_trials_without_predictions_have_values_and_no_intervals(tmp_path: Path) -> None:
    played(settings(trials=3), folder := tmp_path / "bare")
    for number in range(3):
        (trial_folder(folder, number) / "predictions.json").unlink()
    text = page(folder)
    assert "best in the search: trial" in text
    assert "tied" not in text


def test_what_was_confirmed_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(settings(trials=3), folder := tmp_path / "sure")
    monkeypatch.setattr(cli_confirm, "run_and_show", played)
    test = said(REFERENCE, 7, "test")
    monkeypatch.setattr(confirm, "predict", lambda *_: SplitPredictions(test, {"classify": LABELS}, {}))
    assert sweep("confirm", folder, "--top", 2, "--seeds", 2).code == 0
    text = page(folder)
    assert "chosen: trial" in text
    assert "optimism of the search" in text
    assert "<h2>Confirmed</h2>" in text


def test_sweeps_of_other_corpora_and_objectives_are_not_ranked(tmp_path: Path) -> None:
    def other(name: str, fingerprint: str = "f" * 16, **search: Any) -> Path:
        played(settings(trials=1, **search), folder := tmp_path / name)
        StudyStore.open(folder, settings(trials=1, **search)).study.set_user_attr("fingerprint", fingerprint)
        return folder

    first, text, corpus = other("a"), other("b", points=[TEXT]), other("c", fingerprint="0" * 16)
    objective = other("d", metric="loss")
    found = page(first, "--with", text, "--with", corpus, "--with", objective)
    assert found.count("not ranked: ") == 2
    assert f"another corpus or split: {'0' * 16}, not {'f' * 16}" in found
    assert "another objective: loss, not macro_f1" in found


def test_a_point_may_differ_in_two_choices(tmp_path: Path) -> None:
    """One that is drawn may not: its difference would say nothing of either."""
    both = REFERENCE | {"model.lora.rank": 16, "model.end_of_audio": "learned"}
    for name, points in {"asked": [REFERENCE, both], "drawn": [REFERENCE]}.items():
        config = settings(trials=2, points=points)
        played(config.with_values({"search.points": [REFERENCE, both]}), folder := tmp_path / name)
        study = StudyStore.read(folder, config)
        found = ablation.find_choices(study, study.trials()[0])
        expected = ["rank: 8 → 16, end_of_audio: none → learned"] if name == "asked" else []
        assert [ablation.choice_name(config, choice) for choice in found] == expected


def test_trainings_on_other_folds_are_no_choice(tmp_path: Path) -> None:
    """They predict other items."""
    points = [REFERENCE | {"seed": 1, "data.fold": fold} for fold in (0, 1)]
    config = settings(trials=2, points=points)
    space = config.search.model_dump(mode="json")["space"] | {"seed": [1, 2], "data.fold": [0, 1]}
    played(config := config.with_values({"search.space": space}), tmp_path)
    study = StudyStore.read(tmp_path, config)
    assert len(study.trials()) == 2
    assert ablation.find_choices(study, study.trials()[0]) == []


def test_a_second_stage_stands_in_the_ablation_of_the_first(tmp_path: Path) -> None:
    """As does what differs in one setting; what differs in three, in the seed, or in its corpus does not."""
    played(settings(trials=4), first := tmp_path / "first")

    def other(name: str, fingerprint: str = "f" * 16, **changed: Any) -> list[object]:
        own = settings(trials=1).with_values({"name": name} | {key.replace("__", "."): changed[key] for key in changed})
        played(own, folder := tmp_path / name)
        StudyStore.open(folder, own).study.set_user_attr("fingerprint", fingerprint)
        return ["--with", folder]

    stage = {"model__init_from": "/elsewhere/first/trials/0002", "model__trainable": "lora"}
    others = other("stage-2", **stage) + other("longer", train__epochs=3) + other("both", train__epochs=3, **stage)
    others += other("again", seed=1) + other("elsewhere", "0" * 16, **stage)
    text = page(first, *others, *others[:2], "--with", first)  # each is shown once
    table = pd.read_csv(first / "report" / "ablation.csv").set_index("trial")
    assert [name for name in table.index if "of" in name] == ["#0 of stage-2", "#0 of longer"]
    assert table.loc["#0 of stage-2", "choice"] == "trainable: new → lora, model.init_from: none → trial 2 of first"
    assert table.loc["#0 of stage-2", "difference"] == 0.0
    assert table.loc["#0 of longer", "choice"] == "epochs: 2 → 3"
    assert "none → trial 2 of first" in text


def test_a_folder_that_is_no_sweep(tmp_path: Path, finished: Path) -> None:
    assert "not the folder of a sweep" in complaint(sweep("report", tmp_path))
    assert "not the folder of a sweep" in complaint(sweep("report", finished, "--with", tmp_path))
    assert not (tmp_path / "report").exists()


def test_a_choice_that_takes_others_along_counts_as_one(finished: Path) -> None:
    study = StudyStore.read(finished, settings(trials=10))
    entries = study.trials()
    found = ablation.find_choices(study, ablation.find_reference(study.config, entries))
    [modality] = [choice for choice in found if choice.changed.keys() == {"model.modality"}]
    assert entries[modality.number].params == TEXT


def test_the_report_lies_beside_the_runs_in_mlflow(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, tmp_path)
    played(settings(trials=2), folder := tmp_path / "logged")
    page(folder)
    assert to_mlflow(folder, []) == "not there, since the sweep has no run yet"
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("logged", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment).info.run_id
    (folder / "mlflow.json").write_text(json.dumps({"run_id": run}))
    outcome = sweep("report", folder)
    assert "in MLflow: artifacts of the sweep's run, under report" in outcome.out
    names = {Path(file.path).name for file in client.list_artifacts(run, "report")}
    assert names == {path.name for path in (folder / "report").iterdir()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (folder / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32}))  # the client remembers the other's place
    away = sweep("report", folder)
    assert away.code == 0
    assert "in MLflow: not there (" in away.out
