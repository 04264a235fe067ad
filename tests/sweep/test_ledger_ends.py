"""How trials end in the ledger: complete, pruned, failed; the best of them; and looking on while another writes.

Every test runs on a journal file, SQLite and PostgreSQL.
"""

from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from sweep.config.files import dump, load
from sweep.search.study import Ledger, trial_config
from tests.sweep.common import POINTS, ask, report
from tests.sweep.stores import postgres, pruned, settings, shared_sqlite, storage  # noqa: F401 — fixtures


def test_a_pruned_trial_is_told_so_and_stays_so(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, pruned())
    ask(ledger, 5)
    for number, value in enumerate((0.9, 0.8, 0.1)):
        assert report(ledger, number, 1 - value, value) == [False, False], "fewer than four trials are there"
    assert report(ledger, 3, 0.9, 0.2) == [False, True]
    for again in (ledger, Ledger.open(tmp_path, pruned()), Ledger.read(tmp_path, pruned())):
        assert [entry.state for entry in again.entries()] == ["RUNNING"] * 3 + ["PRUNED", "RUNNING"]
        entry = again.entries()[3]
        assert (entry.why, entry.value) == ("pruned at epoch 2: 3. of 4 by macro_f1", 0.2)
    assert ledger.report(3, 3, {"macro_f1": 1.0, "steps": 30}), "a trial that ended stays ended"
    assert ledger.entries()[3].curve == {1: 0.9, 2: 0.2}


def test_small_losses_win(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, config := pruned(metric="loss"))
    ask(ledger, 5)
    assert [report(ledger, number, 9.0, loss)[-1] for number, loss in enumerate((4.0, 3.0, 2.0, 1.0))] == [False] * 4
    assert report(ledger, 4, 0.0, 3.5) == [False, True]
    assert ledger.entries()[4].why == "pruned at epoch 2: 4. of 5 by loss"
    for number in (2, 3):
        ledger.report(number, 4, {"loss": 2.5 - number / 2, "steps": 40})
        ledger.complete(number)
    best = Ledger.read(tmp_path, config).best()
    assert best is not None
    assert (best.number, best.value) == (3, 1.0)


def test_nobody_is_pruned_at_his_last_epoch(tmp_path: Path) -> None:
    config = pruned().with_values({"train.epochs": 2})
    ledger = Ledger.open(tmp_path, config)
    ask(ledger, 5)
    assert not any(report(ledger, number, value, value)[-1] for number, value in enumerate((0.9, 0.8, 0.7, 0.1, 0.0)))


def test_nobody_is_pruned_at_his_last_epoch_when_epochs_are_searched(tmp_path: Path) -> None:
    axis = {"train.epochs": [2, 4]}
    ledger = Ledger.open(tmp_path, pruned(space=axis, points=[{"train.epochs": 4}] * 3 + [{"train.epochs": 2}]))
    ask(ledger, 4)
    assert not any(report(ledger, number, value, value)[-1] for number, value in enumerate((0.9, 0.8, 0.7, 0.1)))


def test_a_pruning_that_a_kill_cut_short_is_decided_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.open(tmp_path, pruned())
    ask(ledger, 4)
    for number in (1, 2, 3):
        report(ledger, number, 0.9, 0.9)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger.study, "tell", killed)
    with pytest.raises(KeyboardInterrupt):
        report(ledger, 0, 0.1, 0.1)
    again = Ledger.open(tmp_path, pruned())
    assert again.entries()[0].state == "RUNNING"
    assert report(again, 0, 0.1, 0.1) == [False, True]
    assert again.entries()[0].state == "PRUNED"


def test_a_failure_keeps_its_reason_and_counts(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, settings())
    ask(ledger, 2)
    report(ledger, 1, 0.9, 0.9, 0.9, 0.9)
    ledger.complete(1)
    ledger.fail(0, "non-finite loss at step 3", reason="non-finite")
    ledger.fail(0, "again")
    ledger.fail(1, "too late")
    entries = Ledger.open(tmp_path, settings()).entries()
    assert [(entry.state, entry.why, entry.reason) for entry in entries] == [
        ("FAIL", "non-finite loss at step 3", "non-finite"),
        ("COMPLETE", "trained to the end", None),
    ]
    assert ledger.ask([], 2) is None, "a failed trial counts towards the target"


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_a_trial_that_ends_in_no_number_has_failed(value: float, tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, settings())
    ask(ledger, 2)
    for number, last in enumerate((value, 0.1)):
        report(ledger, number, 0.9, last)
        ledger.complete(number)
    failed, _ = Ledger.read(tmp_path, settings()).entries()
    assert (failed.state, failed.why) == ("FAIL", "the macro_f1 of the last epoch is not finite")
    assert failed.reason == "non-finite"
    best = ledger.best()
    assert best is not None
    assert best.number == 1


def test_nan_is_kept_and_pruned_like_the_worst_value(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, pruned())
    ask(ledger, 5)
    assert report(ledger, 0, nan, nan) == [False, False]
    for number in (1, 2, 3):
        assert report(ledger, number, 0.1, 0.1 * number) == [False, False]
    assert report(ledger, 4, 0.1, nan) == [False, True]
    first = Ledger.open(tmp_path, pruned()).entries()[0]
    assert [isnan(value) for value in first.curve.values()] == [True, True]
    assert isnan(first.metrics["macro_f1"])


def test_nan_is_not_called_the_first(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, pruned())
    ask(ledger, 4)
    for number in (1, 2, 3):
        report(ledger, number, 0.1, 0.1)
    report(ledger, 0, nan, nan)
    assert ledger.entries()[0].why == "pruned at epoch 2: 4. of 4 by macro_f1"


def test_the_best_is_the_earlier_of_equals(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, settings())
    ask(ledger, 5)
    for number, value in {3: 0.7, 1: 0.7, 0: 0.2, 2: -0.5}.items():
        report(ledger, number, 0.9, value)
        ledger.complete(number)
    report(ledger, 4, 0.99)
    best = ledger.best()
    assert best is not None
    assert (best.number, best.value) == (1, 0.7)


def test_looking_on_while_another_writes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trial has started yet"):
        Ledger.read(tmp_path, settings())
    assert list(tmp_path.iterdir()) == [], "a look leaves nothing behind"
    writer = Ledger.open(tmp_path, settings())
    reader = Ledger.read(tmp_path, settings())
    assert reader.entries() == []
    ask(writer, 2)
    report(writer, 1, 0.5)
    assert [(entry.number, entry.curve) for entry in reader.entries()] == [(0, {}), (1, {1: 0.5})]


def test_a_trials_configuration_reproduces_it(tmp_path: Path) -> None:
    config = settings()
    ledger = Ledger.open(tmp_path, config)
    (_, params), _ = ask(ledger, 2)
    own = ledger.trial_config(ledger.entries()[0])
    assert own == trial_config(config, params)
    assert (own.model.modality, own.model.lora.rank, own.train.learning_rate) == tuple(
        POINTS[0][key] for key in ("model.modality", "model.lora.rank", "train.learning_rate")
    )
    assert (own.search.space, own.search.points, own.train.epochs, own.seed) == ({}, [], 4, 0)
    (tmp_path / "again.yaml").write_text(dump(own))
    assert load(str(tmp_path / "again.yaml")) == own
