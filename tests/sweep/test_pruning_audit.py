"""The pruning audit: the top trials that each rung keeps, the audited trials, and a warning where winners are lost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sweep.analysis.leaderboard import leaderboard
from sweep.analysis.results import trial_json
from sweep.analysis.status import progress_json
from sweep.config.schema import Config, parse
from sweep.search.pruning_audit import RungAudit, audit_rungs, format_lines, format_warning
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


def test_top_quarter_is_audited_at_every_rung() -> None:
    assert audit_rungs(config(), crossing(8)) == [RungAudit(1, 8, (7, 6), (7, 6)), RungAudit(2, 8, (7, 6), ())]
    assert format_lines(config(), crossing(8)) == [
        "pruning audit: of the top 2 of 8 complete trials, the rule keeps 0 of 2 after epoch 1, 2 of 2 after epoch 2"
    ]
    assert format_warning(config(), crossing(8)) == (
        "pruning loses winners: the rule would have pruned #7, #6 after epoch 1; in a new sweep (--out) raise "
        "search.pruning.first_epoch (now 1) or search.pruning.keep"
    )


def test_small_losses_are_the_top() -> None:
    down = config(metric="loss")
    assert [(rung.top, rung.lost) for rung in audit_rungs(down, crossing(4))] == [((0,), (0,)), ((0,), ())]


def test_pruned_trials_are_peers_only() -> None:
    """Their ends are unknown, though the best values at a rung may be theirs."""
    pruned = [trial(number, 9.0, state="PRUNED") for number in (4, 5)]
    audits = audit_rungs(config(), [*crossing(4), *pruned])
    assert audits == [RungAudit(1, 6, (3,), (3,)), RungAudit(2, 4, (3,), ())]


def test_rung_with_few_values_is_not_audited() -> None:
    assert audit_rungs(config(), crossing(3)) == []
    assert (format_lines(config(), crossing(3)), format_warning(config(), crossing(3))) == ([], None)
    assert audit_rungs(config(), [trial(number, 0.5, 0.5, state="RUNNING") for number in range(9)]) == []


def test_trial_is_not_judged_at_its_last_epoch() -> None:
    short = trial(9, -9.0, 9.0, params={"train.epochs": 2})
    assert [rung.epoch for rung in audit_rungs(config(), [*crossing(3), short])] == [1]


def test_exempted_trial_is_lost_at_its_rung() -> None:
    """Among all trials it would pass now; among fewer, when it was there, it did not."""
    rising = [trial(number, number, number, number, number) for number in range(7)]
    winner = trial(7, 7.0, 7.0, 7.0, 7.0, audited=True, exempted_at=2)
    assert audit_rungs(config(), [*rising, winner]) == [RungAudit(1, 8, (7, 6), ()), RungAudit(2, 8, (7, 6), (7,))]
    assert "#7 after epoch 2" in str(format_warning(config(), [*rising, winner]))


@pytest.mark.parametrize(("lost", "warned"), [((), False), ((18,), False), ((19,), True), ((17, 18), True)])
def test_losing_the_best_or_several_trials_warns(lost: Sequence[int], warned: bool) -> None:
    """The top five count."""
    trials = [
        trial(number, *[float(-1 if number in lost and epoch == 1 else number) for epoch in (1, 2, 3, 4)])
        for number in range(20)
    ]
    first, _ = audit_rungs(config(), trials)
    assert (first.top, sorted(first.lost)) == ((19, 18, 17, 16, 15), list(lost))
    assert (format_warning(config(), trials) is not None) == warned


def test_audit_reports_how_exempted_trials_finished() -> None:
    none = [*crossing(2), trial(2, 5.0, 5.0, 5.0, 5.0, audited=True)]
    assert format_lines(config(), none) == ["exempt from pruning: 1 trial; the rule would have pruned none"]
    one = [
        *none,
        trial(3, 0.0, 0.0, 0.0, 0.5, audited=True, exempted_at=1),
        trial(4, 0.0, state="RUNNING", audited=True),
    ]
    assert format_lines(config(), one)[-1] == (
        "exempt from pruning: 2 trials; the rule would have pruned #3 after epoch 1, which finished 3rd of 4"
    )


def test_audit_is_in_leaderboard_note_and_json(tmp_path: Path) -> None:
    trials = [*crossing(7), trial(7, -7.0, 7.0, 7.0, 7.0, audited=True, exempted_at=1)]
    lines = [*format_lines(config(), trials), str(format_warning(config(), trials))]
    assert len(lines) == 3
    board = leaderboard(config(), tmp_path, trials)
    note = mlflow_note(config(), tmp_path, trials)
    for line in lines:
        assert line in [*board.audit, board.warning]
        assert line in note
    assert "- #7 so" in note
    assert trial_json(trials[7], None).items() >= {"audited": True, "spared": 1}.items()
    assert progress_json(config(), tmp_path, trials)["pruning"] == {
        "rungs": [1, 2],
        "recall": [
            {"epoch": 1, "values": 8, "top": [7, 6], "lost": [7, 6]},
            {"epoch": 2, "values": 8, "top": [7, 6], "lost": []},
        ],
        "audited": [7],
        "spared": [7],
        "warning": lines[-1],
    }


def test_search_without_pruning_has_no_audit(tmp_path: Path) -> None:
    whole = config(pruning=None)
    assert (audit_rungs(whole, crossing(8)), format_lines(whole, crossing(8)), format_warning(whole, crossing(8))) == (
        [],
        [],
        None,
    )
    board = leaderboard(whole, tmp_path, crossing(8))
    assert (board.audit, board.warning) == ([], None)
