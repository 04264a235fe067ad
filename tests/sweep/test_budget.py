"""What ends a search before its number of trials: a budget that is spent, and a gain that is smaller than the noise."""

import time
from pathlib import Path
from typing import Any

import pytest

from data.errors import ConfigError
from sweep.analysis.results import progress
from sweep.analysis.status import progress_json
from sweep.config.diff import compare
from sweep.config.schema import Config, parse
from sweep.preflight.eta import eta, remaining_work
from sweep.search.cost import budget_lines, spent
from sweep.search.stopping import (
    LEAST,
    doubling_gain,
    ended_early,
    gain_below_noise,
    noise_between_trainings,
    total_trials,
)
from sweep.search.study import StudyStore, TrialRecord
from tests.sweep.common import ask, play, report, settings


def budgeted(limits: dict[str, float]) -> Config:
    return settings(points=[], budget=limits)


@pytest.mark.parametrize(
    ("limits", "ended", "line"),
    [
        ({"steps": 100}, 3, "120 of 100 steps"),  # a trial makes 40
        ({"trials": 2}, 2, "2 of 2 full trainings"),
        ({"trials": 2.5, "steps": 10**6}, 3, "3 of 2.5 full trainings"),
        ({"hours": 1}, 9, ""),
    ],
)
def test_spent_budget_ends_the_search(limits: dict[str, float], ended: int, line: str, tmp_path: Path) -> None:
    config = budgeted(limits)
    for _ in range(2):  # rerunning the command starts nothing
        list(play(study := StudyStore.open(tmp_path, config), 9))
        assert len(study.trials()) == total_trials(config, study.trials()) == ended
    why = ended_early(config, study.trials())
    assert why == (f"search.budget is spent ({line})" if line else None)
    assert progress(config, study.trials()).ended == why
    assert progress_json(config, tmp_path, study.trials())["ended_early"] == why
    more = settings(points=[])
    assert not compare(config, more).refused
    assert total_trials(more, study.trials()) == 9


def test_budget_counts_what_was_recorded_before_a_kill(tmp_path: Path) -> None:
    """Running trials train to their end, and a resumed sweep starts no others."""
    config = budgeted({"steps": 50})
    ask(study := StudyStore.open(tmp_path, config), 2)
    report(study, 0, 0.1, 0.2, 0.3)
    report(study, 1, 0.1, 0.2)
    resumed = StudyStore.open(tmp_path, config)
    assert resumed.ask([0, 1], 9) is None
    again = [resumed.ask([], 9), resumed.ask([0], 9)]
    assert [trial and trial.number for trial in again] == [0, 1]
    assert (total_trials(config, resumed.trials()), budget_lines(config, resumed.trials())) == (2, ["50 of 50 steps"])


def test_hours_are_those_in_which_the_sweep_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    config = budgeted({"hours": 2})
    for _ in range(2):
        study = StudyStore.open(tmp_path, config)
        trial = study.ask([], 9)
        assert trial is not None
        now[0] += 3600
        study.report(trial.number, len(study.trials()[0].curve) + 1, {"macro_f1": 0.1, "steps": 1, "seconds": 60})
        now[0] += 10**5  # killed after the report: until the next run, no time is spent
    used = spent(config, StudyStore.read(tmp_path, config).trials())
    assert (used["hours"], used["gpu_hours"]) == (2.0, 60 / 3600)
    assert StudyStore.open(tmp_path, config).ask([0], 9) is None


@pytest.mark.parametrize(
    ("limits", "trials"),
    [
        ({"trials": 2.5}, 3),
        ({"steps": 150}, 4),  # a trial makes 40
        ({"gpu_hours": 700 / 3600}, 2),  # and takes 400 s
        ({"hours": 1}, 9),
    ],
)
def test_estimate_ends_with_the_budget(limits: dict[str, float], trials: int, tmp_path: Path) -> None:
    config = settings(points=[]).with_values({"resources.gpus_per_worker": 1, "search.budget": limits})
    ask(study := StudyStore.open(tmp_path, config), 1)
    for epoch in range(1, 5):
        study.report(0, epoch, {"macro_f1": 0.5, "steps": 10 * epoch, "seconds": 100 * epoch})
    study.complete(0)
    work = remaining_work(config, study.trials(), [], 4, lambda _: 100.0)
    assert work == [400.0] * (trials - 1)
    assert eta(work, 1, last_start=900) == min(1200.0, sum(work)), "the third one starts before that"


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"budget": {}}, r"a budget needs a limit: set gpu_hours, hours, steps or trials, or budget to null"),
        ({"budget": {"gpu_hours": 2}}, r"search.budget.gpu_hours: 2.0, and trials use no GPU .* set hours, steps or"),
        ({"budget": {"steps": 0}}, r"search.budget.steps"),
        ({"stop_when": "tired"}, r"search.stop_when"),
        ({"stop_when": "noise"}, r"search.stop_when: noise is read from 4 epochs or more, and train.epochs is 3"),
    ],
)
def test_bad_budget_is_refused_in_one_line(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        parse({"name": "a", "train": {"epochs": 3}, "search": search}, "a.yaml")
    assert len(str(refusal.value).splitlines()) <= 2


def record(number: int, last: float, state: Any = "COMPLETE", noise: float = 0.01) -> TrialRecord:
    """A trial whose objective jumps up and down by `noise` around its last value."""
    curve = {epoch: last + noise * (epoch % 2) for epoch in range(1, 9)}
    return TrialRecord(number, state, {}, last, {}, 8, curve, "")


def test_search_stops_once_the_gain_is_below_the_noise() -> None:
    config = settings(stop_when="noise", trials=99)
    rising = [record(number, 0.02 * number) for number in range(40)]
    flat = [record(number, 0.3 + 0.001 * (number % 7)) for number in range(40)]
    assert doubling_gain(config, rising) == pytest.approx(0.4)
    assert noise_between_trainings(flat) == pytest.approx(0.008, abs=5e-4)
    assert gain_below_noise(config, rising) is None
    assert gain_below_noise(config, flat[: LEAST - 1]) is None
    assert gain_below_noise(config, flat[:LEAST]) == (
        "search.stop_when: the last 8 trials gained 0.000 of macro_f1, less than the noise between trainings (0.008)"
    )
    late = [*flat[:LEAST], record(LEAST, 0.9, state="RUNNING")]
    assert gain_below_noise(config, late) is not None, "what a running trial will be worth is unknown"


def test_search_that_stopped_stays_so_until_it_is_extended(tmp_path: Path) -> None:
    config = settings(stop_when="noise", trials=30, points=[])
    study = StudyStore.open(tmp_path, config)
    while (trial := study.ask([], 30)) is not None:
        report(study, trial.number, *[0.3 + 0.01 * (epoch % 2) for epoch in range(4)])
        study.complete(trial.number)
    again = StudyStore.open(tmp_path, config)
    assert (len(again.trials()), total_trials(config, again.trials()), again.ask([], 30)) == (LEAST, LEAST, None)
    assert "search.stop_when" in str(ended_early(config, again.trials()))
    longer = settings(trials=30, points=[])
    assert not compare(config, longer).refused
    assert total_trials(longer, again.trials()) == 30
    assert StudyStore.open(tmp_path, longer).ask([], 30) is not None
