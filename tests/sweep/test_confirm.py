"""`sweep confirm`: fresh seeds for the best, pairs, the optimism of a search, the test split, read once, and folds."""

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
from sweep.analysis import confirm
from sweep.analysis.evaluate import SplitPredictions
from sweep.analysis.predictions import read_predictions
from sweep.cli import results as cli_confirm
from sweep.config.diff import claim_folder
from sweep.config.files import load
from sweep.config.schema import Config
from sweep.search.study import StudyStore
from tests.conftest import LABELS
from tests.sweep.common import complaint, sweep
from tests.sweep.searched import FOLDS, REFERENCE, TEXT, held, played, said, settings


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a search that has ended; nothing is trained when it is confirmed, and the test split is counted."""
    played(settings(), folder := tmp_path / "played")
    monkeypatch.setattr(cli_confirm, "run_and_show", played)
    read: list[str] = []

    def predict(trial: Path, split: str) -> SplitPredictions:
        own = StudyStore.read(trial.parents[1], load(str(trial.parents[1] / "config.yaml")))
        params = own.trials()[int(trial.name)].params
        read.append(f"{trial.name} {split}")
        (tmp_path / "read.json").write_text(json.dumps(read))
        return SplitPredictions(held(said(params, params["seed"], split), params, split), {"classify": LABELS}, {})

    monkeypatch.setattr(confirm, "predict", predict)
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


def confirmed(folder: Path, *args: object) -> dict[str, Any]:
    outcome = sweep("confirm", folder, *args)
    assert (outcome.code, outcome.err) == (0, "")
    confirmation = confirm.read(folder)
    assert confirmation is not None
    content: dict[str, Any] = json.loads(json.dumps(confirmation.to_json()))
    return content


def test_the_best_are_trained_again_under_fresh_seeds(search: Path) -> None:
    confirmed(search, "--top", 2, "--seeds", 3)
    config = load(str(confirm.confirm_folder(search) / "config.yaml"))
    seeds = [point["seed"] for point in config.search.points]
    assert sorted(seeds) == [1000, 1000, 1001, 1001, 1002, 1002]
    assert (config.search.trials, config.search.pruning, config.storage.keep) == (6, None, None)
    assert config.train == settings().train
    assert StudyStore.read(search, settings()).trials()[0].params == REFERENCE  # the search is as it was


def test_a_better_one_beats_and_equals_are_tied(search: Path) -> None:
    found = confirmed(search, "--top", 6, "--seeds", 3)
    best = found["ranked"][0]
    verdicts = {pair["other"]: (pair["val"]["better"], pair["test"]["better"]) for pair in found["pairs"]}
    entries = {entry.number: entry for entry in StudyStore.read(search, settings()).trials()}
    for number, verdict in verdicts.items():
        text = entries[number].params["model.modality"] == "text"
        assert verdict == ((True, True) if text else (None, None)), entries[number].params
    assert best["params"]["model.modality"] == "speech"
    assert best["val"]["low"] < best["val"]["value"] < best["val"]["high"]
    lines = "\n".join(found["lines"])
    assert f"chosen: trial {best['number']}" in lines
    assert f"#{best['number']} beats #" in lines
    assert "tied within noise" in lines
    assert "optimism of the search: trial" in lines


def test_more_is_added_to_what_was_confirmed(search: Path) -> None:
    confirmed(search, "--top", 1, "--seeds", 2)
    first = confirm.confirm_folder(search) / "trials" / "0000" / "predictions.json"
    written = first.stat().st_mtime_ns
    found = confirmed(search, "--top", 2, "--seeds", 3)
    assert [own["seeds"] for own in found["ranked"]] == [[1000, 1001, 1002]] * 2
    assert first.stat().st_mtime_ns == written
    smaller = confirmed(search, "--top", 1, "--seeds", 1)
    assert len(smaller["ranked"]) == 2  # nothing that was computed is thrown away


def test_the_test_split_is_read_once_by_each_training(search: Path) -> None:
    for _ in range(2):
        confirmed(search, "--top", 2, "--seeds", 2)
    read = json.loads((search.parent / "read.json").read_text())
    assert sorted(read) == [f"{number:04d} test" for number in range(4)]


def test_without_a_test_split_validation_alone_is_told(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any) -> SplitPredictions:
        raise MisfitError("the test split has nothing for the task")

    monkeypatch.setattr(confirm, "predict", nothing)
    found = confirmed(search, "--top", 2, "--seeds", 2)
    assert [own["test"] for own in found["ranked"]] == [None, None]
    assert "test:" not in "\n".join(found["lines"])


def test_seeds_of_the_search_are_not_fresh() -> None:
    assert confirm.fresh_seeds(settings(), 2) == [1000, 1001]
    axis = {"seed": [1000, 1002, 3], "model.lora.rank": [4]}
    assert confirm.fresh_seeds(settings(space=axis, points=[]), 3) == [1001, 1003, 1004]


def test_trials_that_differ_by_seed_alone_are_one_configuration(tmp_path: Path) -> None:
    points = [REFERENCE | {"seed": seed} for seed in (0, 1, 2)] + [TEXT | {"seed": 0}]
    space = settings().model_dump()["search"]["space"] | {"seed": [0, 1, 2]}
    config = settings(space=space, points=points, trials=4)
    played(config, folder := tmp_path / "seeds")
    planned = confirm.plan(StudyStore.read(folder, config), folder, top=3, seeds=1)
    assert len(planned.search.points) == 2


def test_the_status_of_what_confirms_ranks_nothing(search_on_a_fold: Path, folded: Config) -> None:
    study, search = StudyStore.read(search_on_a_fold, folded), search_on_a_fold
    best = study.best()
    assert best is not None
    for folds, where in ((None, ""), (FOLDS, ", fold 0")):
        planned = confirm.plan(study, search, top=2, seeds=1, folds=folds)
        place = confirm.confirm_folder(search, folds)
        played(planned.with_values({"search.trials": 1}), place)
        claim_folder(planned, place)
        shown = sweep("status", place).out
        assert f"\n#0 trial {best.number}, seed 1000{where}: COMPLETE, macro_f1 0." in shown
        assert f"confirms the trials of {search}; `sweep confirm {search}` compares them" in shown
        assert "sweep run" not in shown
        assert "best" not in shown
        assert json.loads(sweep("status", place, "--json").out)["progress"]["best"] is None
    confirmed(search, "--top", 2, "--seeds", 1)
    assert "chosen: trial" in sweep("status", confirm.confirm_folder(search)).out


def test_a_search_that_is_named_like_a_confirmation_stays_one(search: Path) -> None:
    played(settings(), named := confirm.confirm_folder(search))
    assert "best" in sweep("status", named).out


def test_json_for_scripts(search: Path) -> None:
    outcome = sweep("confirm", search, "--top", 1, "--seeds", 2, "--json")
    found = json.loads(outcome.out[outcome.out.index("{") :])
    assert found.keys() == {"metric", "folds", "ranked", "pairs", "lines"}


def test_each_configuration_is_trained_on_each_fold(search_on_a_fold: Path) -> None:
    found = confirmed(search_on_a_fold, "--top", 2, "--folds", FOLDS)
    config = load(str(confirm.confirm_folder(search_on_a_fold, FOLDS) / "config.yaml"))
    points = [(point["seed"], point["data.fold"]) for point in config.search.points]
    assert sorted(points) == [(1000, 0), (1000, 0), (1000, 1), (1000, 1), (1000, 2), (1000, 2)]
    assert (config.name, config.search.pruning, found["folds"]) == ("played-folds", None, FOLDS)
    assert not confirm.confirm_folder(search_on_a_fold).exists()


def test_what_the_folds_hold_out_is_pooled_by_seed(search_on_a_fold: Path) -> None:
    """The mean of the folds' own values would be another number."""
    found = confirmed(search_on_a_fold, "--top", 2, "--seeds", 2, "--folds", FOLDS)
    for own in found["ranked"]:
        assert own["seeds"] == [1000, 1001]
        for split in ("val", "test"):
            whole = [summarise(said(own["params"], seed, split), {"classify": LABELS}, {}) for seed in own["seeds"]]
            assert own[split]["value"] == pytest.approx(sum(one["macro_f1"] for one in whole) / 2)
            assert own[split]["low"] < own[split]["value"] < own[split]["high"]
    lines = "\n".join(found["lines"])
    assert f"mean of 2 fresh seeds, {FOLDS} folds pooled; " in lines
    assert f" on one fold in the search, and {found['ranked'][0]['val']['value']:.3f} (" in lines
    assert f" on all {FOLDS}, and " in lines


def test_a_seed_counts_once_all_of_its_folds_are_complete(search_on_a_fold: Path, folded: Config) -> None:
    study = StudyStore.read(search_on_a_fold, folded)
    planned = confirm.plan(study, search_on_a_fold, top=1, seeds=2, folds=FOLDS)
    place = confirm.confirm_folder(search_on_a_fold, FOLDS)
    played(planned.with_values({"search.trials": FOLDS - 1}), place)
    with pytest.raises(UserError, match="no training is complete on every fold yet"):
        confirm.confirm(study, search_on_a_fold, FOLDS)
    played(planned.with_values({"search.trials": FOLDS + 1}), place)
    assert confirm.confirm(study, search_on_a_fold, FOLDS).chosen.seeds == [1000]


def test_the_last_confirmation_counts(search_on_a_fold: Path) -> None:
    assert confirmed(search_on_a_fold, "--top", 1, "--folds", FOLDS)["folds"] == FOLDS
    assert confirmed(search_on_a_fold, "--top", 1, "--seeds", 1)["folds"] is None
    assert confirmed(search_on_a_fold, "--top", 1, "--folds", FOLDS)["folds"] == FOLDS


def test_folds_that_are_not_there_are_told_in_a_line(search_on_a_fold: Path, folded: Config, corpus: Shards) -> None:
    def refused(changed: dict[str, Any], folds: int) -> str:
        config = folded.with_values(changed)
        with pytest.raises(UserError) as error:
            confirm.plan(StudyStore.read(search_on_a_fold, config), search_on_a_fold, top=1, seeds=1, folds=folds)
        return str(error.value)

    assert refused({}, 5).startswith("--folds 5: ")
    assert refused({}, 5).endswith(f" has {FOLDS} folds; use --folds {FOLDS}")
    assert "has no folds; prepare the corpus with --set split.folds=5 into" in refused(
        {"data.shards": str(corpus.folder)}, 5
    )
    for key in ("model.init_from", "model.adapter.init_from"):
        assert f"{key} names weights that may have been trained on any fold" in refused({key: "former"}, FOLDS)


def test_nothing_to_confirm_is_told_in_a_line(tmp_path: Path) -> None:
    played(settings(), folder := tmp_path / "played")
    assert "not the folder of a sweep" in complaint(sweep("confirm", tmp_path / "nowhere"))
    (folder / "study.journal").unlink()
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
    shards, places = Shards(folded.data.shards), sorted((confirm.confirm_folder(folder, FOLDS) / "trials").iterdir())
    coded = {name for name, label in zip(shards.columns["id"], shards.columns["label"], strict=True) if label}
    for name, behind in (("predictions.json", 1), ("test.json", 0)):
        held = [{record.id for record in read_predictions(place, name)["classify"][1]} for place in places]
        assert sum(map(len, held)) == len(set.union(*held)) == len(coded)
        for place, ids in zip(places, held, strict=True):
            part = (load(str(place / "config.yaml")).data.fold + behind) % FOLDS
            folds = dict(zip(shards.columns["id"], shards.columns["fold"], strict=True))
            assert {folds[one] for one in ids} == {part}
    found = confirm.read(folder)
    assert found is not None
    assert (found.folds, found.chosen.seeds) == (FOLDS, [1000])
    assert (len(found.lines()), found.chosen.test is None) == (2, False)
