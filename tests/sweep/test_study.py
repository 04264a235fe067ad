"""The study: what was asked and reported survives any kill, and a resumed search is the same search.

Tests of what is stored run on a journal file, SQLite and PostgreSQL; tests of the rules run on a journal file.
"""

from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import Trial

from data.errors import UserError
from sweep.config.files import dump, load
from sweep.config.schema import Config
from sweep.execution.tune import common_fault
from sweep.search.study import Reason, State, StudyStore, TrialRecord
from tests.sweep.common import POINTS, Asked, ask, play, report, whole_and_resumed
from tests.sweep.stores import every_storage, postgres, pruned, settings, shared_sqlite, storage  # noqa: F401

RANK, RATE = "model.lora.rank", "train.learning_rate"
SMALL = {RANK: [2, 4, 8], RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
LARGE = {RANK: [2, 4, 8, 16, 32], RATE: {"low": 1e-5, "high": 1e-1, "log": True}}
AUDITED = 1  # and then every fourth trial


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def best(study: StudyStore) -> TrialRecord:
    trial = study.best()
    assert trial is not None
    return trial


def run(study: StudyStore, target: int, limit: int = 8, reason: Reason = "out of memory") -> list[Asked]:
    """Run trials one after another; ranks above `limit` fail, and the learning rate is the objective of the others."""
    asked = []
    while (trial := study.ask([], target)) is not None:
        number, values = trial
        if values[RANK] > limit:
            study.fail(number, "out of memory at step 3", reason=reason)
        else:
            report(study, number, values.get(RATE, values[RANK]))
            study.complete(number)
        asked.append(trial)
    return asked


def audited(folder: Path, epochs: int = 4) -> StudyStore:
    """Three trials that did well at the first rung, and others that have not begun; one in four is audited."""
    ask(study := StudyStore.open(folder, quarter(epochs)), 8)
    for number in (0, 2, 3):
        assert report(study, number, 0.5, 0.5) == [False, False]
    return study


def quarter(epochs: int = 4) -> Config:
    """Rungs are at epochs 2, 4, 8 …"""
    return pruned(audit=0.25).with_values({"train.epochs": epochs})


@every_storage
def test_trial_runs_completes_and_is_read_again(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, config := settings())
    [(number, params)] = ask(study, 1)
    running = TrialRecord(0, "RUNNING", params, None, {}, 0, {}, "running")
    assert (number, params, study.trials(), study.best()) == (0, POINTS[0], [running], None)
    assert report(study, 0, 0.25, 0.5) == [False, False]
    [trial] = StudyStore.read(tmp_path, config).trials()
    assert (trial.state, trial.value, trial.curve, trial.steps) == ("RUNNING", 0.5, {1: 0.25, 2: 0.5}, 20)
    study.complete(0)
    metrics, curve = {"macro_f1": 0.5, "steps": 20}, {1: 0.25, 2: 0.5}
    done = TrialRecord(0, "COMPLETE", params, 0.5, metrics, 20, curve, "trained to the end", epoch=2)
    assert (study.trials(), study.best()) == ([done], done)
    assert StudyStore.open(tmp_path, config).trials() == [done]


def test_points_come_first_then_drawn_values(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, config := settings())
    first = list(play(study, 3))
    asked = first + list(play(StudyStore.open(tmp_path, config), 9))  # a larger target extends the sweep
    assert [number for number, _ in asked] == list(range(9))
    assert (asked[0][1], asked[1][1][RANK]) == (POINTS[0], 16)
    assert len({repr(params) for _, params in asked[2:]}) == 7, "drawn values repeat"
    assert all(("model.trainable" in values) == (values["model.modality"] == "speech") for _, values in asked)
    assert StudyStore.open(tmp_path, config).ask([], 9) is None


@every_storage
def test_resume_starts_with_unfinished_trials(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    before = ask(study, 5)
    report(study, 0, 0.1)
    study.complete(0)
    study.fail(3, "lost")
    again = StudyStore.open(tmp_path, settings())
    assert again.running() == [1, 2, 4]
    asked: list[Asked] = []
    while (trial := again.ask([number for number, _ in asked], 7)) is not None:
        asked.append(trial)
    assert asked[:3] == [before[1], before[2], before[4]]
    assert [number for number, _ in asked[3:]] == [5, 6]
    assert again.ask([1, 2, 4, 5, 6], 7) is None


@pytest.mark.parametrize("pruning", ["none", "all", "audited"])
def test_resumed_search_draws_the_same_trials(pruning: str, tmp_path: Path) -> None:
    config = settings() if pruning == "none" else pruned(audit=0.4 if pruning == "audited" else 0.0)
    whole, resumed = whole_and_resumed(tmp_path, config)
    assert resumed == whole
    one = StudyStore.open(tmp_path / "one", config)
    assert StudyStore.open(tmp_path / "many", config).trials() == one.trials()
    assert {trial.state for trial in one.trials()} == {"COMPLETE", *(["PRUNED"] if config.search.pruning else [])}
    assert any(trial.exempted_at for trial in one.trials()) == (pruning == "audited")


@every_storage
def test_kill_while_asking_leaves_no_half_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "killed"):
        (tmp_path / name).mkdir()
    whole = ask(StudyStore.open(tmp_path / "one", settings()), 3)
    study = StudyStore.open(tmp_path / "killed", settings())
    ask(study, 2)
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


@every_storage
def test_repeated_reports_change_nothing(tmp_path: Path) -> None:
    """A passed rung is not judged again, and an epoch that is trained again keeps its first value."""
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 4)
    assert report(study, 0, 0.1, 0.1, 0.6) == [False] * 3, "no other trial was at epoch 2 yet"
    for number in (1, 2, 3):
        report(study, number, 0.5, 0.5, 0.6)
    before = study.trials()
    for values in ((0.1, 0.1, 0.6), (0.1, 0.0, 0.9)):
        again = StudyStore.open(tmp_path, pruned())
        assert report(again, 0, *values) == [False] * 3
        assert again.trials() == before
    assert again.report(2, 4, {"macro_f1": 0.7, "steps": 40}) is False
    assert again.trials()[2].curve == {1: 0.5, 2: 0.5, 3: 0.6, 4: 0.7}


def test_lost_reports_are_filled_in(tmp_path: Path) -> None:
    """A checkpoint is written before its epoch is reported: a kill in between costs the report."""
    ask(StudyStore.open(tmp_path, pruned()), 1)
    report(StudyStore.open(tmp_path, pruned()), 0, 0.1)
    again = StudyStore.open(tmp_path, pruned())
    again.report(0, 3, {"macro_f1": 0.3, "steps": 30})
    assert report(again, 0, 0.1, 0.2, 0.3) == [False] * 3
    [trial] = StudyStore.read(tmp_path, pruned()).trials()
    assert (list(trial.curve.items()), trial.value, trial.steps) == ([(1, 0.1), (2, 0.2), (3, 0.3)], 0.3, 30)


@pytest.mark.parametrize("value", [0.1, 0.9], ids=["equal", "other"])
def test_kill_while_pruning_decides_again_alike(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first report of the rung decides, also if the epoch is trained again with another result."""
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 4)
    for number in (1, 2, 3):
        report(study, number, 0.5, 0.5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study.study, "tell", killed)
        report(study, 0, 0.1, 0.1)
    again = StudyStore.open(tmp_path, pruned())
    assert again.trials()[0].state == "RUNNING"
    assert report(again, 0, 0.1, value) == [False, True]
    assert again.trials()[0].state == "PRUNED"


def test_corpus_and_code_are_stored(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    assert study.bind("aa", "1+x") is None
    assert StudyStore.open(tmp_path, settings()).bind("aa", "1+x") is None
    assert StudyStore.open(tmp_path, settings()).bind("aa", "1+y") == (
        "code: 1+x → 1+y; results may differ from those of earlier trials"
    )
    with pytest.raises(UserError, match=r"started on another corpus \(fingerprint: aa → bb\); restore .* or use --out"):
        study.bind("bb", "1+z")
    again = StudyStore.read(tmp_path, settings())
    assert (again.fingerprint(), again.codes()) == ("aa", ["1+x", "1+y"])


@every_storage
def test_pruned_trial_keeps_its_state_and_reason(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 5)
    for number, value in enumerate((0.9, 0.8, 0.1)):
        assert report(study, number, 1 - value, value) == [False, False], "fewer than four trials are there"
    assert report(study, 3, 0.9, 0.2) == [False, True]
    for again in (study, StudyStore.open(tmp_path, pruned()), StudyStore.read(tmp_path, pruned())):
        assert [trial.state for trial in again.trials()] == ["RUNNING"] * 3 + ["PRUNED", "RUNNING"]
        trial = again.trials()[3]
        assert (trial.why, trial.value) == ("pruned at epoch 2: ranked 3rd of 4 by macro_f1", 0.2)
    assert study.report(3, 3, {"macro_f1": 1.0, "steps": 30}), "a trial that ended stays ended"
    assert study.trials()[3].curve == {1: 0.9, 2: 0.2}


def test_small_losses_win(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, config := pruned(metric="loss"))
    ask(study, 5)
    assert [report(study, number, 9.0, loss)[-1] for number, loss in enumerate((4.0, 3.0, 2.0, 1.0))] == [False] * 4
    assert report(study, 4, 0.0, 3.5) == [False, True]
    assert study.trials()[4].why == "pruned at epoch 2: ranked 4th of 5 by loss"
    for number in (2, 3):
        study.report(number, 4, {"loss": 2.5 - number / 2, "steps": 40})
        study.complete(number)
    assert (best(StudyStore.read(tmp_path, config)).number, best(study).value) == (3, 1.0)


@pytest.mark.parametrize("searched", [False, True])
def test_last_epoch_prunes_no_trial(searched: bool, tmp_path: Path) -> None:
    points = [{"train.epochs": epochs, "seed": seed} for seed, epochs in enumerate((4, 4, 4, 2))]
    config = pruned(space={"train.epochs": [2, 4], "seed": [0, 1, 2, 3]}, points=points) if searched else pruned()
    study = StudyStore.open(tmp_path, config if searched else config.with_values({"train.epochs": 2}))
    ask(study, 4)
    assert not any(report(study, number, value, value)[-1] for number, value in enumerate((0.9, 0.8, 0.7, 0.1)))


def test_failed_trial_keeps_reason_and_counts(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 2)
    report(study, 1, 0.9, 0.9, 0.9, 0.9)
    study.complete(1)
    study.fail(0, "non-finite loss at step 3", reason="non-finite")
    study.fail(0, "again")
    study.fail(1, "too late")
    trials = StudyStore.open(tmp_path, settings()).trials()
    assert [(trial.state, trial.why, trial.reason) for trial in trials] == [
        ("FAIL", "non-finite loss at step 3", "non-finite"),
        ("COMPLETE", "trained to the end", None),
    ]
    assert study.ask([], 2) is None, "a failed trial counts towards the target"


@every_storage
@pytest.mark.parametrize("value", [nan, inf])
def test_trial_without_finite_objective_fails(value: float, tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 2)
    for number, last in enumerate((value, 0.1)):
        report(study, number, 0.9, last)
        study.complete(number)
    failed, _ = StudyStore.read(tmp_path, settings()).trials()
    assert (failed.state, failed.reason) == ("FAIL", "non-finite")
    assert failed.why == "the macro_f1 of the last epoch is not finite"
    assert best(study).number == 1


@every_storage
@pytest.mark.parametrize("searched", [False, True])
def test_trial_that_keeps_its_best_epoch_has_its_value(searched: bool, tmp_path: Path) -> None:
    """Its metrics are those of that epoch, and its costs those of all epochs, also while it runs or if it is pruned."""
    point = {"train.keep": "best"}
    config = settings(space={"train.keep": ["last", "best"]}, points=[point]) if searched else settings()
    study = StudyStore.open(tmp_path, config if searched else config.with_values(point))
    ask(study, 2)
    for epoch, (value, steps) in enumerate(((0.2, 10), (0.7, 20), (nan, 30), (0.7, 40)), start=1):
        study.report(0, epoch, {"macro_f1": value, "loss": 1.0 / epoch, "steps": steps})
        study.report(0, epoch, {"macro_f1": 0.9, "loss": 0.0, "steps": 0})  # a resumed trial repeats its reports
    running = study.trials()[0]
    study.complete(0)
    for trial in (running, StudyStore.read(tmp_path, study.config).trials()[0]):
        assert (trial.epoch, trial.value, trial.metrics["loss"], trial.steps) == (2, 0.7, 0.5, 40)
    assert len(trial.curve) == 4


def test_nan_ranks_last_and_is_stored(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 5)
    report(study, 0, nan, nan)  # the first one, which has no peers
    for number in (1, 2, 3):
        assert report(study, number, 0.1, 0.1 * number) == [False, False]
    assert report(study, 4, 0.1, nan) == [False, True]
    first, *_, last = StudyStore.open(tmp_path, pruned()).trials()
    assert [isnan(value) for value in first.curve.values()] == [True, True]
    assert isnan(first.metrics["macro_f1"])
    assert last.why == "pruned at epoch 2: ranked 4th of 5 by macro_f1"


def test_best_is_the_earlier_of_equal_trials(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 5)
    for number, value in {3: 0.7, 1: 0.7, 0: 0.2, 2: -0.5}.items():
        report(study, number, 0.9, value)
        study.complete(number)
    report(study, 4, 0.99)
    assert (best(study).number, best(study).value) == (1, 0.7)


@every_storage
def test_reader_follows_a_writer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trial has started yet"):
        StudyStore.read(tmp_path, settings())
    assert list(tmp_path.iterdir()) == [], "reading leaves nothing behind"
    writer = StudyStore.open(tmp_path, settings())
    reader = StudyStore.read(tmp_path, settings())
    assert reader.trials() == []
    ask(writer, 2)
    report(writer, 1, 0.5)
    assert [(trial.number, trial.curve) for trial in reader.trials()] == [(0, {}), (1, {1: 0.5})]


def test_trial_config_reproduces_the_trial(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, config := settings())
    (_, params), _ = ask(study, 2)
    trial = study.trial_config(study.trials()[0])
    assert trial == config.for_trial(params)
    assert (trial.model.modality, trial.model.lora.rank, trial.train.learning_rate) == tuple(
        POINTS[0][key] for key in ("model.modality", RANK, RATE)
    )
    assert (trial.search.space, trial.search.points, trial.train.epochs, trial.seed) == ({}, [], 4, 0)
    (tmp_path / "again.yaml").write_text(dump(trial))
    assert load(str(tmp_path / "again.yaml")) == trial


def test_audited_trial_continues_past_the_rung(tmp_path: Path) -> None:
    study = audited(tmp_path)
    assert report(study, AUDITED, 0.1, 0.1, 0.1, 0.9) == [False] * 4
    study.complete(AUDITED)
    assert report(study, 4, 0.1, 0.1) == [False, True], "the others are pruned as usual"
    for again in (study, StudyStore.read(tmp_path, quarter())):
        assert [trial.number for trial in again.trials() if trial.audited] == [AUDITED, AUDITED + 4]
        assert [trial.exempted_at for trial in again.trials()] == [None, 2, *[None] * 6]
        trial = best(again)
        assert (trial.number, trial.state, trial.value) == (AUDITED, "COMPLETE", 0.9)
        assert trial.why == "trained to the end (exempt from pruning; would have been pruned at epoch 2)"


def test_kill_during_an_exemption_decides_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, write = audited(tmp_path), Trial.set_user_attr

    def cut(self: Trial, key: str, value: Any) -> None:
        if key == "spared":
            raise KeyboardInterrupt
        write(self, key, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trial, "set_user_attr", cut)
        report(study, AUDITED, 0.1, 0.1)
    again = StudyStore.open(tmp_path, quarter())
    assert (again.trials()[AUDITED].exempted_at, again.trials()[AUDITED].state) == (None, "RUNNING")
    assert report(again, AUDITED, 0.1, 0.1) == [False, False]
    assert again.trials()[AUDITED].exempted_at == 2


def test_repeated_reports_change_no_exemption(tmp_path: Path) -> None:
    study = audited(tmp_path)
    report(study, AUDITED, 0.1, 0.1)
    for number in (4, 6, 7):
        report(study, number, 0.0, 0.0)
    report(study, 5, 0.6, 0.6)  # audited, too, and not behind
    before = study.trials()
    again = StudyStore.open(tmp_path, quarter())
    assert report(again, AUDITED, 0.1, 0.1) == report(again, 5, 0.6, 0.6) == [False, False]
    assert again.trials() == before
    assert [before[number].exempted_at for number in (AUDITED, 5)] == [2, None]


def test_first_exempted_rung_counts(tmp_path: Path) -> None:
    study = audited(tmp_path, epochs=9)
    assert report(study, AUDITED, 0.5, 0.5) == [False, False]
    for number in (0, 2, 3, 4):
        report(study, number, 0.5, 0.5, 0.5, 0.5)
    values = [0.5, 0.5, 0.1, 0.1]
    assert report(study, AUDITED, *values) == [False] * 4
    for number in (0, 2, 3, 4):
        report(study, number, *[0.5] * 8)
    assert report(study, AUDITED, *values, *[0.1] * 5) == [False] * 9
    assert study.trials()[AUDITED].exempted_at == 4


def test_exempted_trial_is_no_peer_of_others(tmp_path: Path) -> None:
    """Without the audit it would not be there: with it, the third of three would be judged among four."""
    study = audited(tmp_path, epochs=9)
    report(study, AUDITED, 0.1, 0.1, 0.1, 0.1)
    assert study.trials()[AUDITED].exempted_at == 2
    for number, value in ((0, 0.9), (2, 0.8), (3, 0.7)):
        assert report(study, number, 0.5, 0.5, 0.5, value) == [False] * 4


def test_audit_of_all_trials_prunes_none(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned(audit=1.0))
    ask(study, 5)
    ends = [report(study, number, *[value] * 4) for number, value in enumerate((0.9, 0.8, 0.7, 0.1, 0.0))]
    assert not any(map(any, ends))
    assert [trial.exempted_at for trial in study.trials()] == [None, None, None, 2, 2]


def test_search_where_nothing_fits_draws_at_random(tmp_path: Path) -> None:
    """Otherwise the first of the infeasible trials would be the best, and drawn again and again."""
    config = settings(points=[], space={RANK: {"low": 16, "high": 1024}}, startup_trials=2)
    study = StudyStore.open(tmp_path, config)
    drawn = [values[RANK] for _, values in run(study, 9)]
    assert len(set(drawn)) > 6
    assert {trial.state for trial in study.trials()} == {"FAIL"}


def test_out_of_memory_parameters_are_avoided(tmp_path: Path) -> None:
    """The same sweeps with failures that say nothing about their parameters are the comparison."""
    space = {RANK: {"low": 1, "high": 64}, RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
    too_large: dict[Reason, int] = {"out of memory": 0, "error": 0}
    for reason in too_large:
        for seed in range(2):
            (folder := tmp_path / f"{reason}{seed}").mkdir()
            config = settings(points=[], space=space, startup_trials=8).model_copy(update={"seed": seed})
            run(study := StudyStore.open(folder, config), 30, limit=32, reason=reason)
            too_large[reason] += sum(trial.params[RANK] > 32 for trial in study.trials()[12:])
    # Of 36 trials each. A random search would have half; TPE that ignores failures keeps asking for them.
    assert too_large["out of memory"] < 0.3 * 36, too_large
    assert too_large["out of memory"] < 0.5 * too_large["error"], too_large


@every_storage
def test_space_that_grew_keeps_earlier_trials(tmp_path: Path) -> None:
    before = run(StudyStore.open(tmp_path, settings(points=[], space=SMALL)), 5, limit=99)
    study = StudyStore.open(tmp_path, wider := settings(points=[], space=LARGE))
    assert [trial.params for trial in study.trials()] == [values for _, values in before]
    more = run(study, 16, limit=99)
    assert {values[RANK] for _, values in more} & {16, 32}
    assert any(not 1e-4 <= values[RATE] <= 1e-2 for _, values in more)
    assert all(trial.params.keys() == {RANK, RATE} for trial in StudyStore.read(tmp_path, wider).trials())
    assert all(study.trial_config(trial).model.lora.rank == trial.params[RANK] for trial in study.trials())


def test_lists_of_choices_may_grow_again(tmp_path: Path) -> None:
    for count, choices in enumerate([[2, 4], [2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 8, 16]], start=1):
        space = {RANK: choices, "seed": {"low": 0, "high": 99}}
        study = StudyStore.open(tmp_path, settings(points=[], space=space))
        run(study, 4 * count, limit=99)
    assert all(trial.params.keys() == {RANK, "seed"} for trial in study.trials())
    assert [trial.state for trial in study.trials()] == ["COMPLETE"] * 16


def test_running_trials_keep_values_as_space_grows(tmp_path: Path) -> None:
    before = ask(StudyStore.open(tmp_path, settings(points=[], space=SMALL)), 3)
    new = {"model.cls": ["none", "after"], "model.end_of_audio": {"choices": ["none", "learned"], "when": {RANK: [2]}}}
    config = settings(points=[{RANK: 32, "model.cls": "after"}], space=LARGE | new)
    assert (config.model.cls, config.model.end_of_audio) == ("none", "none")
    again = ask(StudyStore.open(tmp_path, config), 4)
    for (number, old), (same, now) in zip(before, again[:3], strict=True):
        fixed = {"model.end_of_audio": "none"} if old[RANK] == 2 else {}
        assert (same, now) == (number, old | {"model.cls": "none"} | fixed)
    assert again[3][1].items() >= {RANK: 32, "model.cls": "after"}.items(), "a new point is the next trial"


def failures(*whys: tuple[Reason, str], state: State = "FAIL") -> list[TrialRecord]:
    return [TrialRecord(number, state, {}, None, {}, 0, {}, why, reason) for number, (reason, why) in enumerate(whys)]


NO_FILE: tuple[Reason, str] = ("bad data", "/runs/x/0001/part-3: no such file")
COMPLETE = TrialRecord(9, "COMPLETE", {}, 0.5, {}, 1, {1: 0.5}, "trained to the end")


@pytest.mark.parametrize(
    ("trials", "is_common"),
    [
        ([], False),
        (failures(NO_FILE, NO_FILE), False),
        (failures(NO_FILE, ("bad data", "/runs/x/0002/part-4: no such file"), NO_FILE), True),
        (failures(("error", "a"), NO_FILE, NO_FILE, NO_FILE), True),
        (failures(NO_FILE, NO_FILE, ("error", NO_FILE[1])), False),
        (failures(NO_FILE, NO_FILE, ("bad data", "damaged")), False),
        ([COMPLETE, *failures(NO_FILE, NO_FILE, NO_FILE)], False),
        ([*failures(NO_FILE, NO_FILE, NO_FILE), *failures(("error", ""), state="RUNNING")], True),
        (failures(*[("out of memory", f"at step {number}") for number in range(5)]), False),
        (failures(*[("non-finite", f"at step {number}") for number in range(6)]), True),
    ],
)
def test_equal_failures_are_a_common_fault(trials: list[TrialRecord], is_common: bool) -> None:
    """Failures that other parameters may avoid need twice as many."""
    message = common_fault(trials)
    assert (message is not None) == is_common
    if trials and is_common and trials[0].reason == "bad data":
        assert "bad data: /runs/x/0001/part-3: no such file" in str(message)
