"""The ledger: what was asked and reported survives any kill, and a resumed search is the same search."""

from pathlib import Path

import pytest

from sweep.config import Config
from sweep.ledger import FILE, Entry, Ledger
from tests.sweep.common import POINTS, Asked, ask, play, pruned, report, settings


def test_life_of_a_trial(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, settings())
    [(number, params)] = ask(ledger, 1)
    running = Entry(0, "RUNNING", params, None, {}, 0, {}, "running")
    assert (number, params, ledger.entries(), ledger.best()) == (0, POINTS[0], [running], None)
    assert report(ledger, 0, 0.25, 0.5) == [False, False]
    [entry] = ledger.entries()
    assert (entry.state, entry.value, entry.curve, entry.steps) == ("RUNNING", 0.5, {1: 0.25, 2: 0.5}, 20)
    assert ledger.best() is None
    ledger.complete(0)
    done = Entry(
        0, "COMPLETE", params, 0.5, {"macro_f1": 0.5, "steps": 20}, 20, {1: 0.25, 2: 0.5}, "trained to the end"
    )
    assert (ledger.entries(), ledger.best()) == ([done], done)
    assert Ledger.open(tmp_path, settings()).entries() == [done]


def test_points_first_then_drawn_then_nothing(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, settings())
    found = list(play(ledger, 9))
    assert [number for number, _ in found] == list(range(9))
    assert found[0][1] == POINTS[0]
    assert found[1][1]["model.lora.rank"] == 16
    assert len({repr(params) for _, params in found[2:]}) == 7, "drawn values repeat"
    assert all(("model.trainable" in values) == (values["model.modality"] == "speech") for _, values in found)
    assert ledger.ask([], 9) is None


def test_a_killed_sweep_hands_out_its_running_trials_first(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, settings())
    before = ask(ledger, 5)
    report(ledger, 0, 0.1)
    ledger.complete(0)
    ledger.fail(3, "lost")
    (tmp_path / f"{FILE}.lock").touch()  # what a killed driver leaves, held for ever
    again = Ledger.open(tmp_path, settings())
    assert not (tmp_path / f"{FILE}.lock").exists(), "Optuna would wait half a minute for it"
    found: list[Asked] = []
    while (asked := again.ask([number for number, _ in found], 7)) is not None:
        found.append(asked)
    assert found[:3] == [before[1], before[2], before[4]]
    assert [number for number, _ in found[3:]] == [5, 6]
    assert len(again.entries()) == 7


def test_running_trials_stay_within_the_target(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, settings())
    ask(ledger, 3)
    assert ledger.ask([0, 1, 2], 3) is None
    again = Ledger.open(tmp_path, settings())
    assert [again.ask(busy, 3) is None for busy in ([], [0], [0, 1], [0, 1, 2])] == [False, False, False, True]
    assert len(again.entries()) == 3


@pytest.mark.parametrize("config", [settings(), pruned()], ids=["whole", "pruned"])
def test_a_resumed_search_draws_what_an_uninterrupted_one_draws(config: Config, tmp_path: Path) -> None:
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    whole = list(play(one := Ledger.open(tmp_path / "one", config), 9))
    resumed: list[Asked] = []
    for target in range(1, 10):
        killed = Ledger.open(tmp_path / "many", config).ask([], target)
        resumed += play(Ledger.open(tmp_path / "many", config), target)
        assert resumed[-1] == killed
    assert resumed == whole
    assert Ledger.open(tmp_path / "many", config).entries() == one.entries()
    assert {entry.state for entry in one.entries()} == {"COMPLETE", *(["PRUNED"] if config.search.pruning else [])}


def test_a_kill_between_asking_and_drawing_changes_no_value(tmp_path: Path) -> None:
    for name in ("one", "killed"):
        (tmp_path / name).mkdir()
    whole = ask(Ledger.open(tmp_path / "one", settings(points=[])), 1)
    ledger = Ledger.open(tmp_path / "killed", settings(points=[]))
    ledger._new([])  # the trial exists, none of its values does
    assert ask(Ledger.open(tmp_path / "killed", settings(points=[])), 1) == whole


def test_seeds_draw_other_values(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        config = settings(points=[]).model_copy(update={"seed": seed})
        drawn.append(ask(Ledger.open(tmp_path / str(seed), config), 3))
    assert drawn[0] != drawn[1]


def test_a_larger_target_goes_on_counting(tmp_path: Path) -> None:
    first = list(play(Ledger.open(tmp_path, settings(trials=3)), 3))
    more = list(play(Ledger.open(tmp_path, settings(trials=5)), 5))
    assert [number for number, _ in first + more] == [0, 1, 2, 3, 4]
    (tmp_path / "whole").mkdir()
    assert list(play(Ledger.open(tmp_path / "whole", settings(trials=5)), 5)) == first + more


def test_reports_repeated_after_a_resume_change_nothing(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, pruned())
    ask(ledger, 4)
    for number in range(4):
        report(ledger, number, 0.5, 0.5, 0.6)
    before = ledger.entries()
    again = Ledger.open(tmp_path, pruned())
    lines = (tmp_path / FILE).read_bytes()
    assert report(again, 2, 0.5, 0.5, 0.6) == [False] * 3
    assert (again.entries(), (tmp_path / FILE).read_bytes()) == (before, lines)
    assert again.report(2, 4, {"macro_f1": 0.7, "steps": 40}) is False
    assert again.entries()[2].curve == {1: 0.5, 2: 0.5, 3: 0.6, 4: 0.7}


def test_a_trial_is_not_pruned_at_an_epoch_it_had_passed(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, pruned())
    ask(ledger, 4)
    assert report(ledger, 0, 0.1, 0.1, 0.1) == [False] * 3, "nobody else was at epoch 2 yet"
    for number in (1, 2, 3):
        report(ledger, number, 0.9, 0.9)
    assert report(Ledger.open(tmp_path, pruned()), 0, 0.1, 0.1, 0.1) == [False] * 3
