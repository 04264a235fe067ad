"""`sweep confirm`: fresh seeds for the best, pairs, the optimism of a search, the test split, and folds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.corpus import synthetic
from data.corpus.config import CorpusConfig
from data.errors import MisfitError, UserError
from data.preparation.build import prepare
from data.shards.dataset import Shards
from model.evaluation.metrics import summarise
from sweep.analysis import confirm, evaluate
from sweep.analysis.evaluate import SplitPredictions
from sweep.analysis.predictions import read_predictions
from sweep.cli import results as cli_results
from sweep.config.diff import claim_folder
from sweep.config.files import load
from sweep.config.schema import Config
from sweep.search.study import StudyStore
from tests.conftest import LABELS
from tests.sweep.common import complaint, sweep
from tests.sweep.searched import FOLDS, REFERENCE, TEXT, held, played, said, settings


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished search; its confirmation trains nothing, and notes who predicts the test split."""
    played(settings(), folder := tmp_path / "played")
    monkeypatch.setattr(cli_results, "run_and_show", played)

    def predict(trial: Path, split: str, **_: bool) -> SplitPredictions:
        params = StudyStore.of(trial.parents[1]).trials()[int(trial.name)].params
        with (tmp_path / "predicted.txt").open("a") as file:
            file.write(f"{trial.name} {split}\n")
        return SplitPredictions(held(said(params, params["seed"], split), params, split), {"classify": LABELS}, {})

    monkeypatch.setattr(evaluate, "predict", predict)
    return folder


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The settings of a search on the first fold of a corpus."""
    corpus, split = synthetic.corpus(sessions=6, turns=4), {"folds": FOLDS}
    shards = prepare(corpus, tmp_path_factory.mktemp("folds") / "shards", CorpusConfig.model_validate({"split": split}))
    return settings().with_values({"data.shards": str(shards.folder)})


@pytest.fixture
def search_on_a_fold(search: Path, folded: Config) -> Path:
    played(folded, folder := search.with_name("one-fold"))
    return folder


def confirmed(folder: Path, *args: object) -> confirm.Confirmation:
    outcome = sweep("confirm", folder, *args)
    assert (outcome.code, outcome.err) == (0, "")
    confirmation = confirm.read(folder)
    assert confirmation is not None
    return confirmation


def test_confirm_trains_the_best_under_fresh_seeds(search: Path) -> None:
    """A larger plan adds to a smaller one, and nothing that was computed is computed again."""
    confirmed(search, "--top", 1, "--seeds", 2)
    folder = confirm.confirm_folder(search)
    first = folder / "trials" / "0000" / "predictions.json"
    written = first.stat().st_mtime_ns
    confirmation = confirmed(search, "--top", 2, "--seeds", 3)
    config = load(str(folder / "config.yaml"))
    assert sorted(point["seed"] for point in config.search.points) == [1000, 1000, 1001, 1001, 1002, 1002]
    assert (config.search.trials, config.search.pruning, config.storage.keep) == (6, None, None)
    assert config.train == settings().train
    assert StudyStore.of(search).trials()[0].params == REFERENCE  # the search is as it was
    assert [trial.seeds for trial in confirmation.ranked] == [[1000, 1001, 1002]] * 2
    assert first.stat().st_mtime_ns == written
    assert len(confirmed(search, "--top", 1, "--seeds", 1).ranked) == 2
    predicted = (search.parent / "predicted.txt").read_text().splitlines()
    assert sorted(predicted) == [f"{number:04d} test" for number in range(6)]


def test_confirm_damaged_results_are_named(search: Path) -> None:
    confirmed(search, "--top", 1, "--seeds", 1)
    (confirm.confirm_folder(search) / confirm.FILE).write_text('{"metric": "macro_f1"}')
    outcome = sweep("status", confirm.confirm_folder(search))
    assert outcome.code == 2
    assert "confirmed.json: damaged (Field required); remove it" in outcome.err


def test_confirm_compares_the_best_in_pairs(search: Path) -> None:
    confirmation = confirmed(search, "--top", 6, "--seeds", 3)
    best, trials = confirmation.chosen, {trial.number: trial for trial in StudyStore.of(search).trials()}
    for pair in confirmation.pairs:
        assert pair.test is not None
        text = trials[pair.other].params["model.modality"] == "text"
        assert (pair.val.better, pair.test.better) == ((True, True) if text else (None, None)), pair
    assert best.params["model.modality"] == "speech"
    assert best.val.low is not None
    assert best.val.high is not None
    assert best.val.low < best.val.value < best.val.high
    lines = "\n".join(confirmation.lines())
    for words in (f"chosen: trial {best.number}", f"#{best.number} beats #", "tied within noise"):
        assert words in lines
    assert f"optimism of the search: trial {best.number} reached {best.searched:.3f} in the search, and" in lines
    outcome = sweep("confirm", search, "--top", 1, "--seeds", 2, "--json")
    content = json.loads(outcome.out[outcome.out.index("{") :])
    assert list(content) == ["metric", "folds", "ranked", "pairs", "lines"]
    assert list(content["ranked"][0]) == ["number", "params", "searched", "seeds", "val", "test"]
    assert content == json.loads((confirm.confirm_folder(search) / confirm.FILE).read_text())


def test_confirm_without_a_test_split(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> SplitPredictions:
        raise MisfitError("the test split has nothing for the task")

    monkeypatch.setattr(evaluate, "predict", nothing)
    confirmation = confirmed(search, "--top", 2, "--seeds", 2)
    assert [trial.test for trial in confirmation.ranked] == [None, None]
    assert "test:" not in "\n".join(confirmation.lines())


def test_fresh_seeds_are_none_of_the_search(tmp_path: Path) -> None:
    """Trials that differ by their seed alone are one configuration."""
    assert confirm.fresh_seeds(settings(), 2) == [1000, 1001]
    axis = {"seed": [1000, 1002, 3], "model.lora.rank": [4]}
    assert confirm.fresh_seeds(settings(space=axis, points=[]), 3) == [1001, 1003, 1004]
    points = [REFERENCE | {"seed": seed} for seed in (0, 1, 2)] + [TEXT | {"seed": 0}]
    space = settings().model_dump()["search"]["space"] | {"seed": [0, 1, 2]}
    config = settings(space=space, points=points, trials=4)
    played(config, folder := tmp_path / "seeds")
    planned = confirm.plan(StudyStore.read(folder, config), folder, top=3, seeds=1)
    assert len(planned.search.points) == 2


def test_status_of_a_confirmation_ranks_nothing(search_on_a_fold: Path, folded: Config) -> None:
    study, search = StudyStore.read(search_on_a_fold, folded), search_on_a_fold
    best = study.best()
    assert best is not None
    for folds, fold in ((None, ""), (FOLDS, ", fold 0")):
        planned = confirm.plan(study, search, top=2, seeds=1, folds=folds)
        folder = confirm.confirm_folder(search, folds)
        played(planned.with_values({"search.trials": 1}), folder)
        claim_folder(planned, folder)
        out = sweep("status", folder).out
        assert f"\n#0 trial {best.number}, seed 1000{fold}: COMPLETE, macro_f1 0." in out
        assert f"confirms the trials of {search}; `sweep confirm {search}` compares them" in out
        assert "sweep run" not in out
        assert "best" not in out
        assert json.loads(sweep("status", folder, "--json").out)["progress"]["best"] is None
    confirmed(search, "--top", 2, "--seeds", 1)
    assert "chosen: trial" in sweep("status", confirm.confirm_folder(search)).out
    played(settings(), named_alike := confirm.confirm_folder(search.with_name("other")))
    assert "best" in sweep("status", named_alike).out, "without a search of this name it is one itself"


def test_confirm_pools_the_folds_by_seed(search_on_a_fold: Path) -> None:
    """The mean of the folds' own values would be another number. The last confirmation counts."""
    confirmation = confirmed(search_on_a_fold, "--top", 2, "--seeds", 2, "--folds", FOLDS)
    config = load(str(confirm.confirm_folder(search_on_a_fold, FOLDS) / "config.yaml"))
    points = [(point["seed"], point["data.fold"]) for point in config.search.points]
    assert sorted(points) == [(seed, fold) for seed in (1000, 1001) for fold in range(FOLDS) for _ in range(2)]
    assert (config.name, config.search.pruning, confirmation.folds) == ("played-folds", None, FOLDS)
    assert not confirm.confirm_folder(search_on_a_fold).exists()
    for trial in confirmation.ranked:
        assert trial.seeds == [1000, 1001]
        for split, interval in (("val", trial.val), ("test", trial.test)):
            metrics = [summarise(said(trial.params, seed, split), {"classify": LABELS}, {}) for seed in trial.seeds]
            assert interval is not None
            assert interval.value == pytest.approx(sum(values["macro_f1"] for values in metrics) / 2)
            assert interval.low is not None
            assert interval.high is not None
            assert interval.low < interval.value < interval.high
    lines = "\n".join(confirmation.lines())
    assert f"mean of 2 fresh seeds, {FOLDS} folds pooled; " in lines
    assert f" on one fold in the search, and {confirmation.chosen.val.value:.3f} (" in lines
    assert f" on all {FOLDS}, and " in lines
    assert confirmed(search_on_a_fold, "--top", 1, "--seeds", 1).folds is None


def test_seed_counts_once_all_folds_are_complete(search_on_a_fold: Path, folded: Config) -> None:
    study = StudyStore.read(search_on_a_fold, folded)
    planned = confirm.plan(study, search_on_a_fold, top=1, seeds=2, folds=FOLDS)
    folder = confirm.confirm_folder(search_on_a_fold, FOLDS)
    played(planned.with_values({"search.trials": FOLDS - 1}), folder)
    with pytest.raises(UserError, match="no training is complete on every fold yet"):
        confirm.confirm(study, search_on_a_fold, FOLDS)
    played(planned.with_values({"search.trials": FOLDS + 1}), folder)
    assert confirm.confirm(study, search_on_a_fold, FOLDS).chosen.seeds == [1000]


@pytest.mark.parametrize(
    ("changed", "folds", "message"),
    [
        ({}, 5, f"has {FOLDS} folds; use --folds {FOLDS}"),
        ({"data.shards": "CORPUS"}, FOLDS, "has no folds; prepare the corpus with --set split.folds=3 into"),
        ({"model.init_from": "former"}, FOLDS, "model.init_from names weights that may have been trained on any fold"),
        ({"model.adapter.init_from": "former"}, FOLDS, "model.adapter.init_from names weights that may"),
    ],
)
def test_confirm_refuses_folds(
    changed: dict[str, str], folds: int, message: str, folded: Config, corpus: Shards, tmp_path: Path
) -> None:
    config = folded.with_values({key: value.replace("CORPUS", str(corpus.folder)) for key, value in changed.items()})
    played(config.with_values({"search.trials": 1}), tmp_path)
    with pytest.raises(UserError) as error:
        confirm.plan(StudyStore.read(tmp_path, config), tmp_path, top=1, seeds=1, folds=folds)
    assert str(error.value).startswith(f"--folds {folds}: ")
    assert message in str(error.value)


def test_confirm_needs_a_complete_trial(tmp_path: Path) -> None:
    assert "not the folder of a sweep" in complaint(sweep("confirm", tmp_path / "nowhere"))
    claim_folder(settings(), folder := tmp_path / "empty")
    StudyStore.open(folder, settings())
    assert "no trial is complete yet" in complaint(sweep("confirm", folder))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_session_is_held_out_once(folded: Config, models: Path, tmp_path: Path) -> None:
    """Really trained, under Ray and with a teacher; the search before it is played."""
    changed = {
        "name": "real",
        "data.reader": "local",
        "data.fold": 1,
        "model.modality": "text",
        "model.llm.path": str(models / "llm"),
        "train.epochs": 1,
        "train.losses.distillation": 0.5,
        "train.class_weights": "balanced",
        "search.space": {"model.lora.rank": [2, 4], "train.learning_rate": [0.001, 0.01]},
        "search.points": [],
        "search.trials": 1,
    }
    played(folded.with_values(changed), folder := tmp_path / "runs" / "real")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-m", "sweep", "confirm", str(folder), "--top", "1", "--folds", str(FOLDS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    columns = Shards(folded.data.shards).columns
    trials = sorted((confirm.confirm_folder(folder, FOLDS) / "trials").iterdir())
    coded = {name for name, label in zip(columns["id"], columns["label"], strict=True) if label}
    folds = dict(zip(columns["id"], columns["fold"], strict=True))
    for name, behind in (("predictions.json", 1), ("test.json", 0)):
        predicted = [{record.id for record in read_predictions(trial, name)["classify"][1]} for trial in trials]
        assert sum(map(len, predicted)) == len(set.union(*predicted)) == len(coded)
        for trial, ids in zip(trials, predicted, strict=True):
            assert {folds[item] for item in ids} == {(load(str(trial / "config.yaml")).data.fold + behind) % FOLDS}
    confirmation = confirm.read(folder)
    assert confirmation is not None
    assert (confirmation.folds, confirmation.chosen.seeds) == (FOLDS, [1000])
    assert (len(confirmation.lines()), confirmation.chosen.test is None) == (2, False)
