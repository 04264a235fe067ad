"""What pruning may have cost: recall of the top trials at each rung, the audit, and a warning where winners go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sweep.analysis import leaderboard
from sweep.analysis.results import entry_json
from sweep.analysis.status import progress_json
from sweep.config.schema import Config, parse
from sweep.search.pruning_audit import Rung, lines, recall, recall_json, warning
from sweep.search.study import State, TrialRecord
from sweep.tracking.note import note as mlflow_note


def config(**search: Any) -> Config:
    """Rungs are after epochs 1 and 2; of four trials two go on."""
    rule = {"first_epoch": 1, "after_trials": 4}
    return parse({"name": "a", "train": {"epochs": 4}, "search": {"pruning": rule} | search}, "a")


def trial(number: int, *curve: float, state: State = "COMPLETE", **more: Any) -> TrialRecord:
    epochs = dict(enumerate(curve, start=1))
    return TrialRecord(number, state, more.pop("params", {}), curve[-1], {}, 0, epochs, "so", **more)


def crossing(count: int) -> list[TrialRecord]:
    """A higher number ends higher, and is behind after the first epoch."""
    return [trial(number, -number, number, number, number) for number in range(count)]


def test_the_top_quarter_is_looked_for_at_every_rung() -> None:
    assert recall(config(), crossing(8)) == [Rung(1, 8, (7, 6), (7, 6)), Rung(2, 8, (7, 6), ())]
    assert lines(config(), crossing(8)) == [
        "pruning: of the best 2 of 8 trials that trained to the end, the rule keeps 0 of 2 after epoch 1, "
        "2 of 2 after epoch 2"
    ]
    assert warning(config(), crossing(8)) == (
        "pruning loses winners: the rule would have ended #7, #6 after epoch 1; in a new sweep (--out) raise "
        "search.pruning.first_epoch, here 1, or search.pruning.keep"
    )


def test_small_losses_are_the_top() -> None:
    down = config(metric="loss")
    assert [(rung.top, rung.lost) for rung in recall(down, crossing(4))] == [((0,), (0,)), ((0,), ())]


def test_trials_that_were_pruned_are_peers_and_nothing_else() -> None:
    """Nobody knows how they would have ended: the best values at a rung may be theirs."""
    pruned = [trial(number, 9.0, state="PRUNED") for number in (4, 5)]
    found = recall(config(), [*crossing(4), *pruned])
    assert found == [Rung(1, 6, (3,), (3,)), Rung(2, 4, (3,), ())]


def test_a_rung_with_too_few_values_says_nothing() -> None:
    assert recall(config(), crossing(3)) == []
    assert (lines(config(), crossing(3)), warning(config(), crossing(3))) == ([], None)
    assert recall(config(), [trial(number, 0.5, 0.5, state="RUNNING") for number in range(9)]) == []


def test_nobody_is_judged_after_his_last_epoch() -> None:
    short = trial(9, -9.0, 9.0, params={"train.epochs": 2})
    assert [rung.epoch for rung in recall(config(), [*crossing(3), short])] == [1]


def test_who_was_spared_is_lost_there_whatever_came_afterwards() -> None:
    """By now it would pass: it did not when it was there, among fewer."""
    rising = [trial(number, number, number, number, number) for number in range(7)]
    winner = trial(7, 7.0, 7.0, 7.0, 7.0, audited=True, spared=2)
    assert recall(config(), [*rising, winner]) == [Rung(1, 8, (7, 6), ()), Rung(2, 8, (7, 6), (7,))]
    assert "#7 after epoch 2" in str(warning(config(), [*rising, winner]))


@pytest.mark.parametrize(("lost", "warned"), [((), False), ((18,), False), ((19,), True), ((17, 18), True)])
def test_a_warning_for_the_best_or_for_several(lost: Sequence[int], warned: bool) -> None:
    """Of the top five."""
    entries = [
        trial(number, *[float(-1 if number in lost and epoch == 1 else number) for epoch in (1, 2, 3, 4)])
        for number in range(20)
    ]
    first, _ = recall(config(), entries)
    assert (first.top, sorted(first.lost)) == ((19, 18, 17, 16, 15), list(lost))
    assert (warning(config(), entries) is not None) == warned


def test_the_audit_says_what_became_of_those_that_would_have_been_pruned() -> None:
    none = [*crossing(2), trial(2, 5.0, 5.0, 5.0, 5.0, audited=True)]
    assert lines(config(), none) == ["audit: 1 trial could not be pruned; the rule would have ended none"]
    one = [*none, trial(3, 0.0, 0.0, 0.0, 0.5, audited=True, spared=1), trial(4, 0.0, state="RUNNING", audited=True)]
    assert lines(config(), one)[-1] == (
        "audit: 2 trials could not be pruned; the rule would have ended #3 after epoch 1, which came in 3. of 4"
    )


def test_recall_and_audit_are_shown_wherever_trials_are(tmp_path: Path) -> None:
    entries = [*crossing(7), trial(7, -7.0, 7.0, 7.0, 7.0, audited=True, spared=1)]
    found = [*lines(config(), entries), str(warning(config(), entries))]
    assert len(found) == 3
    caption = str(leaderboard.table(config(), tmp_path, entries).caption)
    note = mlflow_note(config(), tmp_path, entries)
    for line in found:
        assert line in caption
        assert line in note
    assert "- #7 so" in note
    assert entry_json(entries[7], None).items() >= {"audited": True, "spared": 1}.items()
    assert progress_json(config(), tmp_path, entries)["pruning"] == {
        "rungs": [1, 2],
        "recall": [
            {"epoch": 1, "values": 8, "top": [7, 6], "lost": [7, 6]},
            {"epoch": 2, "values": 8, "top": [7, 6], "lost": []},
        ],
        "audited": [7],
        "spared": [7],
        "warning": found[-1],
    }


def test_where_nothing_is_pruned_nothing_is_said(tmp_path: Path) -> None:
    whole = config(pruning=None)
    assert (recall(whole, crossing(8)), lines(whole, crossing(8)), warning(whole, crossing(8))) == ([], [], None)
    assert recall_json(whole, crossing(8)) is None
    assert "\n" not in str(leaderboard.table(whole, tmp_path, crossing(8)).caption)
