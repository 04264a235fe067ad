"""The audit in the ledger: some trials are never pruned, and note where they would have been, once and for all.

Every test runs on a journal file, SQLite and PostgreSQL.
"""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import Trial

from sweep.config.schema import Config
from sweep.search.study import StudyStore
from tests.sweep.common import ask, report
from tests.sweep.stores import postgres, pruned, shared_sqlite, storage  # noqa: F401 — fixtures

AUDITED = 1  # and then every fourth


def quarter(epochs: int = 4) -> Config:
    """One of four trials is audited; rungs are at epochs 2, 4, 8 …"""
    return pruned(audit=0.25).with_values({"train.epochs": epochs})


def begin(folder: Path, epochs: int = 4) -> StudyStore:
    """Three trials that did well at the first rung, and others that have not begun."""
    ask(study := StudyStore.open(folder, quarter(epochs)), 8)
    for number in (0, 2, 3):
        assert report(study, number, 0.5, 0.5) == [False, False]
    return study


def test_an_audited_trial_goes_on_and_notes_where_it_would_have_ended(tmp_path: Path) -> None:
    study = begin(tmp_path)
    assert report(study, AUDITED, 0.1, 0.1, 0.1, 0.9) == [False] * 4
    study.complete(AUDITED)
    assert report(study, 4, 0.1, 0.1) == [False, True], "the others end as ever"
    for again in (study, StudyStore.read(tmp_path, quarter())):
        assert [entry.number for entry in again.trials() if entry.audited] == [AUDITED, AUDITED + 4]
        entry = again.trials()[AUDITED]
        assert (entry.state, entry.value, entry.spared) == ("COMPLETE", 0.9, 2)
        assert entry.why == "trained to the end as an audit: else pruned at epoch 2"
        assert [entry.spared for entry in again.trials()].count(None) == 7
        best = again.best()
        assert best is not None
        assert best.number == AUDITED


def test_a_decision_that_a_kill_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, write = begin(tmp_path), Trial.set_user_attr

    def killed(self: Trial, key: str, value: Any) -> None:
        if key == "spared":
            raise KeyboardInterrupt
        write(self, key, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trial, "set_user_attr", killed)
        report(study, AUDITED, 0.1, 0.1)
    again = StudyStore.open(tmp_path, quarter())
    assert (again.trials()[AUDITED].spared, again.trials()[AUDITED].state) == (None, "RUNNING")
    assert report(again, AUDITED, 0.1, 0.1) == [False, False]
    assert again.trials()[AUDITED].spared == 2


def test_what_is_told_again_changes_no_decision(tmp_path: Path) -> None:
    study = begin(tmp_path)
    report(study, AUDITED, 0.1, 0.1)
    for number in (4, 6, 7):
        report(study, number, 0.0, 0.0)
    report(study, 5, 0.6, 0.6)  # audited, too, and not behind
    before = study.trials()
    again = StudyStore.open(tmp_path, quarter())
    assert report(again, AUDITED, 0.1, 0.1) == report(again, 5, 0.6, 0.6) == [False, False]
    assert again.trials() == before
    assert [before[number].spared for number in (AUDITED, 5)] == [2, None]


def test_the_first_rung_at_which_it_would_have_ended_counts(tmp_path: Path) -> None:
    study = begin(tmp_path, epochs=9)
    assert report(study, AUDITED, 0.5, 0.5) == [False, False]
    assert study.trials()[AUDITED].spared is None
    for number in (0, 2, 3, 4):
        report(study, number, 0.5, 0.5, 0.5, 0.5)
    values = [0.5, 0.5, 0.1, 0.1]
    assert report(study, AUDITED, *values) == [False] * 4
    for number in (0, 2, 3, 4):
        report(study, number, *[0.5] * 8)
    assert report(study, AUDITED, *values, *[0.1] * 5) == [False] * 9
    assert study.trials()[AUDITED].spared == 4


def test_a_spared_trial_changes_nothing_for_the_others(tmp_path: Path) -> None:
    """After its rung it would not be there: with it, the third of three would be judged, among four."""
    study = begin(tmp_path, epochs=9)
    report(study, AUDITED, 0.1, 0.1, 0.1, 0.1)
    assert study.trials()[AUDITED].spared == 2
    for number, value in ((0, 0.9), (2, 0.8), (3, 0.7)):
        assert report(study, number, 0.5, 0.5, 0.5, value) == [False] * 4


def test_an_audit_of_all_only_watches(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned(audit=1.0))
    ask(study, 5)
    ends = [report(study, number, *[value] * 4) for number, value in enumerate((0.9, 0.8, 0.7, 0.1, 0.0))]
    assert not any(map(any, ends))
    assert [entry.spared for entry in study.trials()] == [None, None, None, 2, 2]
