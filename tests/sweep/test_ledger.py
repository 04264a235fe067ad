"""The ledger: what was asked and reported survives any kill, and a resumed search is the same search.

Every test runs on a journal file, SQLite and PostgreSQL.
"""

from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from sweep.search.study import StudyStore, TrialRecord
from tests.sweep.common import POINTS, Asked, ask, play, report
from tests.sweep.stores import postgres, pruned, settings, shared_sqlite, storage  # noqa: F401 — fixtures


def test_life_of_a_trial(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    [(number, params)] = ask(study, 1)
    running = TrialRecord(0, "RUNNING", params, None, {}, 0, {}, "running")
    assert (number, params, study.trials(), study.best()) == (0, POINTS[0], [running], None)
    assert report(study, 0, 0.25, 0.5) == [False, False]
    [entry] = study.trials()
    assert (entry.state, entry.value, entry.curve, entry.steps) == ("RUNNING", 0.5, {1: 0.25, 2: 0.5}, 20)
    assert study.best() is None
    study.complete(0)
    done = TrialRecord(
        0, "COMPLETE", params, 0.5, {"macro_f1": 0.5, "steps": 20}, 20, {1: 0.25, 2: 0.5}, "trained to the end"
    )
    assert (study.trials(), study.best()) == ([done], done)
    assert StudyStore.open(tmp_path, settings()).trials() == [done]


def test_points_first_then_drawn_then_nothing(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    found = list(play(study, 9))
    assert [number for number, _ in found] == list(range(9))
    assert found[0][1] == POINTS[0]
    assert found[1][1]["model.lora.rank"] == 16
    assert len({repr(params) for _, params in found[2:]}) == 7, "drawn values repeat"
    assert all(("model.trainable" in values) == (values["model.modality"] == "speech") for _, values in found)
    assert study.ask([], 9) is None


def test_a_killed_sweep_hands_out_its_running_trials_first(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    before = ask(study, 5)
    report(study, 0, 0.1)
    study.complete(0)
    study.fail(3, "lost")
    again = StudyStore.open(tmp_path, settings())
    assert again.running() == [1, 2, 4]
    found: list[Asked] = []
    while (asked := again.ask([number for number, _ in found], 7)) is not None:
        found.append(asked)
    assert found[:3] == [before[1], before[2], before[4]]
    assert [number for number, _ in found[3:]] == [5, 6]
    assert len(again.trials()) == 7


def test_running_trials_stay_within_the_target(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 3)
    assert study.ask([0, 1, 2], 3) is None
    again = StudyStore.open(tmp_path, settings())
    assert [again.ask(busy, 3) is None for busy in ([], [0], [0, 1], [0, 1, 2])] == [False, False, False, True]
    assert len(again.trials()) == 3


@pytest.mark.parametrize("pruning", ["none", "all", "audited"])
def test_a_resumed_search_draws_what_an_uninterrupted_one_draws(pruning: str, tmp_path: Path) -> None:
    config = settings() if pruning == "none" else pruned(audit=0.4 if pruning == "audited" else 0.0)
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    whole = list(play(one := StudyStore.open(tmp_path / "one", config), 9))
    resumed: list[Asked] = []
    for target in range(1, 10):
        killed = StudyStore.open(tmp_path / "many", config).ask([], target)
        resumed += play(StudyStore.open(tmp_path / "many", config), target)
        assert resumed[-1] == killed
    assert resumed == whole
    assert StudyStore.open(tmp_path / "many", config).trials() == one.trials()
    assert {entry.state for entry in one.trials()} == {"COMPLETE", *(["PRUNED"] if config.search.pruning else [])}
    assert any(entry.spared for entry in one.trials()) == (pruning == "audited")


def test_a_trial_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "killed"):
        (tmp_path / name).mkdir()
    whole = ask(StudyStore.open(tmp_path / "one", settings()), 3)
    study = StudyStore.open(tmp_path / "killed", settings())
    ask(study, 2)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study.study, "add_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        study.ask([0, 1], 3)
    assert StudyStore.open(tmp_path / "killed", settings()).running() == [0, 1]
    assert ask(StudyStore.open(tmp_path / "killed", settings()), 3) == whole


def test_seeds_draw_other_values(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        config = settings(points=[]).model_copy(update={"seed": seed})
        drawn.append(ask(StudyStore.open(tmp_path / str(seed), config), 3))
    assert drawn[0] != drawn[1]


def test_a_larger_target_goes_on_counting(tmp_path: Path) -> None:
    first = list(play(StudyStore.open(tmp_path, settings(trials=3)), 3))
    more = list(play(StudyStore.open(tmp_path, settings(trials=5)), 5))
    assert [number for number, _ in first + more] == [0, 1, 2, 3, 4]
    (tmp_path / "whole").mkdir()
    assert list(play(StudyStore.open(tmp_path / "whole", settings(trials=5)), 5)) == first + more


def test_reports_repeated_after_a_resume_change_nothing(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 4)
    for number in range(4):
        report(study, number, 0.5, 0.5, 0.6)
    before = study.trials()
    again = StudyStore.open(tmp_path, pruned())
    assert report(again, 2, 0.5, 0.5, 0.6) == [False] * 3
    assert again.trials() == before
    assert again.report(2, 4, {"macro_f1": 0.7, "steps": 40}) is False
    assert again.trials()[2].curve == {1: 0.5, 2: 0.5, 3: 0.6, 4: 0.7}


def test_a_trial_is_not_pruned_at_an_epoch_it_had_passed(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 4)
    assert report(study, 0, 0.1, 0.1, 0.1) == [False] * 3, "nobody else was at epoch 2 yet"
    for number in (1, 2, 3):
        report(study, number, 0.9, 0.9)
    assert report(StudyStore.open(tmp_path, pruned()), 0, 0.1, 0.1, 0.1) == [False] * 3


def test_reports_that_were_lost_are_filled_in_by_the_checkpoints_history(tmp_path: Path) -> None:
    """The checkpoint of an epoch is written first, then the epoch is told: a kill in between costs the report."""
    ask(StudyStore.open(tmp_path, pruned()), 1)
    report(StudyStore.open(tmp_path, pruned()), 0, 0.1)
    again = StudyStore.open(tmp_path, pruned())
    assert report(again, 0, 0.1, 0.2, 0.3) == [False] * 3
    [entry] = again.trials()
    assert (list(entry.curve.items()), entry.value, entry.steps) == ([(1, 0.1), (2, 0.2), (3, 0.3)], 0.3, 30)


def test_a_hole_in_the_history_is_filled_and_the_last_epoch_stays_the_last(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 1)
    for epoch in (1, 3, 2):
        study.report(0, epoch, {"macro_f1": epoch / 10, "steps": 10 * epoch})
    [entry] = StudyStore.read(tmp_path, pruned()).trials()
    assert (list(entry.curve), entry.value, entry.steps) == ([1, 2, 3], 0.3, 30)


@pytest.mark.parametrize("again", [0.2, 0.9], ids=["equal", "different"])
def test_an_epoch_that_the_checkpoint_lost_keeps_its_first_report(again: float, tmp_path: Path) -> None:
    ask(StudyStore.open(tmp_path, pruned()), 1)
    study = StudyStore.open(tmp_path, pruned())
    report(study, 0, 0.1, 0.2)
    before = study.trials()
    study = StudyStore.open(tmp_path, pruned())
    assert report(study, 0, 0.1, again) == [False, False]
    assert study.trials() == before
    report(study, 0, 0.1, again, 0.3, 0.4)
    study.complete(0)
    assert study.trials()[0].curve == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}


def test_a_rung_is_judged_by_the_first_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a trial whose epoch is trained again by other arithmetic would be judged twice by different numbers."""
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 4)
    for number in (1, 2, 3):
        report(study, number, 0.5, 0.5)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study.study, "tell", killed)
        report(study, 0, 0.1, 0.1)
    assert report(StudyStore.open(tmp_path, pruned()), 0, 0.1, 0.9) == [False, True]


def test_corpus_and_code_are_noted(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    assert study.bind("aa", "1+x") is None
    assert StudyStore.open(tmp_path, settings()).bind("aa", "1+x") is None
    assert StudyStore.open(tmp_path, settings()).bind("aa", "1+y") == (
        "code: 1+x → 1+y; results may differ from those of earlier trials"
    )
    with pytest.raises(UserError, match=r"started on another corpus \(fingerprint: aa → bb\); put .* or use --out"):
        study.bind("bb", "1+z")
    again = StudyStore.read(tmp_path, settings())
    assert (again.fingerprint(), again.codes()) == ("aa", ["1+x", "1+y"])
