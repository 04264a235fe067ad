"""`sweep report`: the page, the tables and the pictures of finished, empty, failed, running and confirmed sweeps."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from markupsafe import escape
from mlflow import MlflowClient

from sweep.analysis import evaluate
from sweep.analysis.evaluate import SplitPredictions
from sweep.analysis.report import ablation, figures
from sweep.cli import results as cli_results
from sweep.config.diff import claim_folder
from sweep.config.paths import trial_folder
from sweep.search.study import StudyStore
from sweep.tracking.report_artifacts import to_mlflow
from tests.conftest import LABELS
from tests.sweep.common import Outcome, complaint, sweep
from tests.sweep.searched import REFERENCE, TEXT, played, said, settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A finished sweep with its report, and what the command printed."""
    played(settings(trials=10, startup_trials=6), folder := tmp_path_factory.mktemp("report") / "played")
    outcome = sweep("report", folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder, outcome


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; one test looks at all pictures."""
    monkeypatch.setattr(figures, "draw_figures", lambda *_: [])
    monkeypatch.setattr(figures, "write_pngs", lambda *_: [])


def page(folder: Path, *args: object) -> str:
    """Write the page of a sweep, and return it without plotly."""
    outcome = sweep("report", folder, *args)
    assert (outcome.code, outcome.err) == (0, "")
    return read(folder)


def read(folder: Path) -> str:
    text = (folder / "report" / "report.html").read_text()
    return re.sub(r"(?s)<script.*?</script>|<wbr>", "", text)


def test_report_of_a_finished_sweep(finished: tuple[Path, Outcome]) -> None:
    folder, outcome = finished
    text, best = read(folder), StudyStore.of(folder).best()
    assert best is not None
    verdict = outcome.out.split("\nin MLflow: ")[0].splitlines()
    assert verdict[0].startswith(f"best in the search: trial {best.number}, macro_f1 {best.value:.3f} [")
    assert all("tied within noise" in line or " beats " in line for line in verdict[1:-1])
    assert verdict[-1].startswith("this is the luckiest of 10 trials")
    assert all(f"<p>{escape(line)}</p>" in text for line in verdict)
    assert text.count("CPU-hours</td>") == 10
    for title in ("How sure the order is", "Does it listen?", "Learning curves", "What mattered", "rank with learning"):
        assert f"<h3>{title}" in text
    names = {path.name for path in (folder / "report").iterdir()}
    tables, drawn = {"ablation.md", "ablation.tex", "ablation.csv"}, {"history.png", "importance.png", "slices.png"}
    assert names >= tables | drawn | {"report.html"}
    assert not [name for name in names if ".unfinished" in name]


def test_page_needs_nothing_from_outside(finished: tuple[Path, Outcome]) -> None:
    text = (finished[0] / "report" / "report.html").read_text()
    assert "Plotly.newPlot" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)


def test_ablation_is_paired_by_single_choices(finished: tuple[Path, Outcome]) -> None:
    folder, _ = finished
    text = read(folder)
    assert "The reference: trial 0 (modality speech, rank 8, learning_rate 1.00e-03, end_of_audio none)." in text
    table = pd.read_csv(folder / "report" / "ablation.csv").set_index("choice")
    assert table.loc["modality: speech → text", "verdict"] == "worse"
    assert table.loc["rank: 8 → 16", "verdict"] == "tied within noise"
    assert table.loc["end_of_audio: none → learned", "difference"] == 0.0
    low, high = map(float, table.loc["modality: speech → text", "95 % interval"].strip("[]").split(","))
    assert low < table.loc["modality: speech → text", "difference"] < high < 0
    tex = (folder / "report" / "ablation.tex").read_text()
    assert r"modality: speech $\rightarrow$ text" in tex
    assert r"macro\_f1" in tex
    assert "| reference " in (folder / "report" / "ablation.md").read_text()


def test_ablation_against_another_reference(finished: tuple[Path, Outcome]) -> None:
    """In a text trial there is no end of audio to choose, so the modality is one choice."""
    study = StudyStore.of(finished[0])
    config, trials = study.config, study.trials()
    choices = ablation.find_choices(study, ablation.find_reference(config, trials))
    [modality] = [choice for choice in choices if choice.changed.keys() == {"model.modality"}]
    assert trials[modality.number].params == TEXT
    reference = ablation.find_reference(config, trials, 1)
    table = ablation.ablation_table(config, reference, ablation.find_choices(study, reference))
    assert {row[-1] for row in table.rows if row[0] == "modality: text → speech"} == {"better"}
    assert "complete are" in complaint(sweep("report", finished[0], "--reference", 99))


def test_importances_are_of_common_parameters(finished: tuple[Path, Outcome]) -> None:
    """Text trials are not left out because text has no end of audio."""
    study = figures.in_memory_study(StudyStore.of(finished[0]))
    assert figures.common_params(study) == ["learning_rate", "modality", "rank"]
    assert {trial.params["modality"] for trial in study.trials} == {"speech", "text"}


def test_report_of_empty_failed_and_running_sweeps(tmp_path: Path) -> None:
    claim_folder(settings(), folder := tmp_path / "empty")
    study = StudyStore.open(folder, settings())
    text = page(folder)
    assert "No trial is complete" in text
    assert "There is nothing to draw yet" in text
    for _ in range(2):
        asked = study.ask([], 9)
        assert asked is not None
        study.fail(asked[0], "non-finite loss at step 840, learning rate 9e-3 <b>", "non-finite")
    text = page(folder)
    assert "non-finite loss at step 840, learning rate 9e-3 &lt;b&gt;" in text
    assert "<b>" not in text
    played(settings(trials=1), folder := tmp_path / "single")
    StudyStore.open(folder, settings(trials=2)).ask([], 2)
    text = page(folder)
    assert "best in the search: trial 0" in text
    assert "1 complete, 1 running" in text
    assert "No complete trial differs from the reference" in text


@pytest.mark.usefixtures("no_pictures")
def test_report_without_predictions_has_no_intervals(tmp_path: Path) -> None:
    played(settings(trials=3), folder := tmp_path / "bare")
    for number in range(3):
        (trial_folder(folder, number) / "predictions.json").unlink()
    text = page(folder)
    assert "best in the search: trial" in text
    assert "tied" not in text


@pytest.mark.usefixtures("no_pictures")
def test_report_shows_the_confirmation_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(settings(trials=3), folder := tmp_path / "sure")
    monkeypatch.setattr(cli_results, "run_and_show", played)
    test = said(REFERENCE, 7, "test")
    monkeypatch.setattr(evaluate, "predict", lambda *_, **__: SplitPredictions(test, {"classify": LABELS}, {}))
    assert sweep("confirm", folder, "--top", 2, "--seeds", 2).code == 0
    text = page(folder)
    for words in ("chosen: trial", "optimism of the search", "<h2>Confirmed</h2>", "<th>in the search</th>"):
        assert words in text


@pytest.mark.usefixtures("no_pictures")
def test_other_corpora_and_objectives_are_not_ranked(tmp_path: Path) -> None:
    def other(name: str, fingerprint: str = "f" * 16, **search: Any) -> Path:
        played(settings(trials=1, **search), folder := tmp_path / name)
        StudyStore.of(folder).study.set_user_attr("fingerprint", fingerprint)
        return folder

    first, text, corpus = other("a"), other("b", points=[TEXT]), other("c", fingerprint="0" * 16)
    objective = other("d", metric="loss")
    found = page(first, "--with", text, "--with", corpus, "--with", objective)
    assert found.count("not ranked: ") == 2
    assert f"another corpus or split: {'0' * 16}, not {'f' * 16}" in found
    assert "another objective: loss, not macro_f1" in found


@pytest.mark.parametrize("points", [2, 1])
def test_only_points_may_differ_in_two_choices(points: int, tmp_path: Path) -> None:
    """The difference of a drawn trial would say nothing about either choice."""
    both = [REFERENCE, REFERENCE | {"model.lora.rank": 16, "model.end_of_audio": "learned"}]
    config = settings(trials=2, points=both[:points])
    played(config.with_values({"search.points": both}), tmp_path)
    study = StudyStore.read(tmp_path, config)
    choices = ablation.find_choices(study, study.trials()[0])
    expected = ["rank: 8 → 16, end_of_audio: none → learned"] if points == 2 else []
    assert [ablation.choice_name(config, choice) for choice in choices] == expected


def test_trainings_on_other_folds_are_no_choice(tmp_path: Path) -> None:
    """They predict other items."""
    points = [REFERENCE | {"seed": 1, "data.fold": fold} for fold in (0, 1)]
    config = settings(trials=2, points=points)
    space = config.search.model_dump(mode="json")["space"] | {"seed": [1, 2], "data.fold": [0, 1]}
    played(config := config.with_values({"search.space": space}), tmp_path)
    study = StudyStore.read(tmp_path, config)
    assert len(study.trials()) == 2
    assert ablation.find_choices(study, study.trials()[0]) == []


@pytest.mark.usefixtures("no_pictures")
def test_ablation_includes_the_second_stage(tmp_path: Path) -> None:
    """So it does with what differs in one setting, but not with what differs in three, in the seed or in its corpus."""
    played(settings(trials=4), first := tmp_path / "first")

    def other(name: str, fingerprint: str = "f" * 16, **changed: Any) -> list[object]:
        values = {key.replace("__", "."): value for key, value in changed.items()}
        played(settings(trials=1).with_values({"name": name} | values), folder := tmp_path / name)
        StudyStore.of(folder).study.set_user_attr("fingerprint", fingerprint)
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


def test_report_needs_the_folder_of_a_sweep(tmp_path: Path, finished: tuple[Path, Outcome]) -> None:
    assert "not the folder of a sweep" in complaint(sweep("report", tmp_path))
    assert "not the folder of a sweep" in complaint(sweep("report", finished[0], "--with", tmp_path))
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_pictures")
def test_report_is_logged_as_mlflow_artifacts(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, tmp_path)
    played(settings(trials=2), folder := tmp_path / "logged")
    assert to_mlflow(folder, []) == "not logged, since the sweep has no run yet"
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("logged", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment).info.run_id
    (folder / "mlflow.json").write_text(json.dumps({"run_id": run}))
    assert "in MLflow: artifacts of the sweep's run, under report" in sweep("report", folder).out
    names = {Path(file.path).name for file in client.list_artifacts(run, "report")}
    assert names == {path.name for path in (folder / "report").iterdir()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (folder / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32}))  # the client remembers the other's address
    away = sweep("report", folder)
    assert away.code == 0
    assert "in MLflow: not logged (" in away.out
