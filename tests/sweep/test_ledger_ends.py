"""How trials end in the ledger: complete, pruned, failed; the best of them; and looking on while another writes.

Every test runs on a journal file, SQLite and PostgreSQL.
"""

from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from sweep.config.files import dump, load
from sweep.search.study import StudyStore
from tests.sweep.common import POINTS, ask, report
from tests.sweep.stores import postgres, pruned, settings, shared_sqlite, storage  # noqa: F401 — fixtures


def test_a_pruned_trial_is_told_so_and_stays_so(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 5)
    for number, value in enumerate((0.9, 0.8, 0.1)):
        assert report(study, number, 1 - value, value) == [False, False], "fewer than four trials are there"
    assert report(study, 3, 0.9, 0.2) == [False, True]
    for again in (study, StudyStore.open(tmp_path, pruned()), StudyStore.read(tmp_path, pruned())):
        assert [entry.state for entry in again.trials()] == ["RUNNING"] * 3 + ["PRUNED", "RUNNING"]
        entry = again.trials()[3]
        assert (entry.why, entry.value) == ("pruned at epoch 2: 3. of 4 by macro_f1", 0.2)
    assert study.report(3, 3, {"macro_f1": 1.0, "steps": 30}), "a trial that ended stays ended"
    assert study.trials()[3].curve == {1: 0.9, 2: 0.2}


def test_small_losses_win(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, config := pruned(metric="loss"))
    ask(study, 5)
    assert [report(study, number, 9.0, loss)[-1] for number, loss in enumerate((4.0, 3.0, 2.0, 1.0))] == [False] * 4
    assert report(study, 4, 0.0, 3.5) == [False, True]
    assert study.trials()[4].why == "pruned at epoch 2: 4. of 5 by loss"
    for number in (2, 3):
        study.report(number, 4, {"loss": 2.5 - number / 2, "steps": 40})
        study.complete(number)
    best = StudyStore.read(tmp_path, config).best()
    assert best is not None
    assert (best.number, best.value) == (3, 1.0)


def test_nobody_is_pruned_at_his_last_epoch(tmp_path: Path) -> None:
    config = pruned().with_values({"train.epochs": 2})
    study = StudyStore.open(tmp_path, config)
    ask(study, 5)
    assert not any(report(study, number, value, value)[-1] for number, value in enumerate((0.9, 0.8, 0.7, 0.1, 0.0)))


def test_nobody_is_pruned_at_his_last_epoch_when_epochs_are_searched(tmp_path: Path) -> None:
    axis = {"train.epochs": [2, 4]}
    study = StudyStore.open(tmp_path, pruned(space=axis, points=[{"train.epochs": 4}] * 3 + [{"train.epochs": 2}]))
    ask(study, 4)
    assert not any(report(study, number, value, value)[-1] for number, value in enumerate((0.9, 0.8, 0.7, 0.1)))


def test_a_pruning_that_a_kill_cut_short_is_decided_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 4)
    for number in (1, 2, 3):
        report(study, number, 0.9, 0.9)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study.study, "tell", killed)
    with pytest.raises(KeyboardInterrupt):
        report(study, 0, 0.1, 0.1)
    again = StudyStore.open(tmp_path, pruned())
    assert again.trials()[0].state == "RUNNING"
    assert report(again, 0, 0.1, 0.1) == [False, True]
    assert again.trials()[0].state == "PRUNED"


def test_a_failure_keeps_its_reason_and_counts(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 2)
    report(study, 1, 0.9, 0.9, 0.9, 0.9)
    study.complete(1)
    study.fail(0, "non-finite loss at step 3", reason="non-finite")
    study.fail(0, "again")
    study.fail(1, "too late")
    entries = StudyStore.open(tmp_path, settings()).trials()
    assert [(entry.state, entry.why, entry.reason) for entry in entries] == [
        ("FAIL", "non-finite loss at step 3", "non-finite"),
        ("COMPLETE", "trained to the end", None),
    ]
    assert study.ask([], 2) is None, "a failed trial counts towards the target"


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_a_trial_that_ends_in_no_number_has_failed(value: float, tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 2)
    for number, last in enumerate((value, 0.1)):
        report(study, number, 0.9, last)
        study.complete(number)
    failed, _ = StudyStore.read(tmp_path, settings()).trials()
    assert (failed.state, failed.why) == ("FAIL", "the macro_f1 of the last epoch is not finite")
    assert failed.reason == "non-finite"
    best = study.best()
    assert best is not None
    assert best.number == 1


def test_nan_is_kept_and_pruned_like_the_worst_value(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 5)
    assert report(study, 0, nan, nan) == [False, False]
    for number in (1, 2, 3):
        assert report(study, number, 0.1, 0.1 * number) == [False, False]
    assert report(study, 4, 0.1, nan) == [False, True]
    first = StudyStore.open(tmp_path, pruned()).trials()[0]
    assert [isnan(value) for value in first.curve.values()] == [True, True]
    assert isnan(first.metrics["macro_f1"])


def test_nan_is_not_called_the_first(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 4)
    for number in (1, 2, 3):
        report(study, number, 0.1, 0.1)
    report(study, 0, nan, nan)
    assert study.trials()[0].why == "pruned at epoch 2: 4. of 4 by macro_f1"


def test_the_best_is_the_earlier_of_equals(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 5)
    for number, value in {3: 0.7, 1: 0.7, 0: 0.2, 2: -0.5}.items():
        report(study, number, 0.9, value)
        study.complete(number)
    report(study, 4, 0.99)
    best = study.best()
    assert best is not None
    assert (best.number, best.value) == (1, 0.7)


def test_looking_on_while_another_writes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trial has started yet"):
        StudyStore.read(tmp_path, settings())
    assert list(tmp_path.iterdir()) == [], "a look leaves nothing behind"
    writer = StudyStore.open(tmp_path, settings())
    reader = StudyStore.read(tmp_path, settings())
    assert reader.trials() == []
    ask(writer, 2)
    report(writer, 1, 0.5)
    assert [(entry.number, entry.curve) for entry in reader.trials()] == [(0, {}), (1, {1: 0.5})]


def test_a_trials_configuration_reproduces_it(tmp_path: Path) -> None:
    config = settings()
    study = StudyStore.open(tmp_path, config)
    (_, params), _ = ask(study, 2)
    own = study.trial_config(study.trials()[0])
    assert own == config.for_trial(params)
    assert (own.model.modality, own.model.lora.rank, own.train.learning_rate) == tuple(
        POINTS[0][key] for key in ("model.modality", "model.lora.rank", "train.learning_rate")
    )
    assert (own.search.space, own.search.points, own.train.epochs, own.seed) == ({}, [], 4, 0)
    (tmp_path / "again.yaml").write_text(dump(own))
    assert load(str(tmp_path / "again.yaml")) == own
