"""`sweep confirm`: fresh seeds for the best, pairs, the optimism of a search, and the test split, read once."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import MisfitError
from sweep import cli_confirm, confirm
from sweep.config import load
from sweep.evaluate import Predicted
from sweep.ledger import Ledger
from tests.conftest import LABELS
from tests.sweep.common import complaint, sweep
from tests.sweep.searched import REFERENCE, TEXT, played, said, settings


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a search that has ended; nothing is trained when it is confirmed, and the test split is counted."""
    played(settings(), folder := tmp_path / "played")
    monkeypatch.setattr(cli_confirm, "run_sweep", played)
    read: list[str] = []

    def predict(trial: Path, split: str) -> Predicted:
        own = Ledger.read(trial.parents[1], load(str(trial.parents[1] / "config.yaml")))
        params = own.entries()[int(trial.name)].params
        read.append(f"{trial.name} {split}")
        (tmp_path / "read.json").write_text(json.dumps(read))
        return Predicted(said(params, params["seed"], split), {"classify": LABELS}, {})

    monkeypatch.setattr(confirm, "predict", predict)
    return folder


def confirmed(folder: Path, *args: object) -> dict[str, Any]:
    outcome = sweep("confirm", folder, *args)
    assert (outcome.code, outcome.err) == (0, "")
    found = confirm.read(folder)
    assert found is not None
    return found


def test_the_best_are_trained_again_under_fresh_seeds(search: Path) -> None:
    confirmed(search, "--top", 2, "--seeds", 3)
    config = load(str(confirm.place_of(search) / "config.yaml"))
    seeds = [point["seed"] for point in config.search.points]
    assert sorted(seeds) == [1000, 1000, 1001, 1001, 1002, 1002]
    assert (config.search.trials, config.search.pruning, config.storage.keep) == (6, None, None)
    assert config.train == settings().train
    assert Ledger.read(search, settings()).entries()[0].params == REFERENCE  # the search is as it was


def test_a_better_one_beats_and_equals_are_tied(search: Path) -> None:
    found = confirmed(search, "--top", 6, "--seeds", 3)
    best = found["ranked"][0]
    verdicts = {pair["other"]: (pair["val"]["better"], pair["test"]["better"]) for pair in found["pairs"]}
    entries = {entry.number: entry for entry in Ledger.read(search, settings()).entries()}
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
    first = confirm.place_of(search) / "trials" / "0000" / "predictions.json"
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
    def nothing(*_: Any) -> Predicted:
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
    planned = confirm.plan(Ledger.read(folder, config), folder, top=3, seeds=1)
    assert len(planned.search.points) == 2


def test_json_for_scripts(search: Path) -> None:
    outcome = sweep("confirm", search, "--top", 1, "--seeds", 2, "--json")
    found = json.loads(outcome.out[outcome.out.index("{") :])
    assert found.keys() == {"metric", "ranked", "pairs", "lines"}


def test_nothing_to_confirm_is_told_in_a_line(tmp_path: Path) -> None:
    played(settings(), folder := tmp_path / "played")
    assert "not the folder of a sweep" in complaint(sweep("confirm", tmp_path / "nowhere"))
    (folder / "study.journal").unlink()
    Ledger.open(folder, settings())
    assert "no trial is complete yet" in complaint(sweep("confirm", folder))
