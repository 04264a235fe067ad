"""Failures: what they teach the search, and which of them end a sweep."""

from pathlib import Path
from typing import Any

import pytest

from sweep.config.schema import Config, parse
from sweep.search.study import Reason, StudyStore, TrialRecord, common_fault
from tests.sweep.common import report, settings

RANK, RATE = "model.lora.rank", "train.learning_rate"


def too_large(folder: Path, reason: Reason, seed: int) -> int:
    """How many of the later trials of a sweep want a rank above 32, which fails; the rate is what counts for others."""
    space = {RANK: {"low": 1, "high": 64}, RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
    config = settings(points=[], space=space, startup_trials=8)
    study = StudyStore.open(folder, config.model_copy(update={"seed": seed}))
    for _ in range(30):
        asked = study.ask([], 30)
        assert asked is not None
        number, values = asked
        if values[RANK] > 32:
            study.fail(number, "out of memory at step 3", reason=reason)
        else:
            report(study, number, values[RATE])
            study.complete(number)
    return sum(entry.params[RANK] > 32 for entry in study.trials()[12:])


def test_what_ran_out_of_memory_is_avoided(tmp_path: Path) -> None:
    """The same sweeps with failures that say nothing about their parameters are the comparison."""
    found: dict[Reason, int] = {"out of memory": 0, "error": 0}
    for reason in found:
        for seed in range(4):
            (folder := tmp_path / f"{reason}{seed}").mkdir()
            found[reason] += too_large(folder, reason, seed)
    # Of 72 trials each. At random it would be half; TPE that ignores failures goes on asking for them.
    assert found["out of memory"] < 0.3 * 72, found
    assert found["out of memory"] < 0.5 * found["error"], found


def failures(*whys: tuple[Reason, str], state: Any = "FAIL") -> list[TrialRecord]:
    return [TrialRecord(number, state, {}, None, {}, 0, {}, why, reason) for number, (reason, why) in enumerate(whys)]


def test_a_fault_of_every_trial_is_told_after_three() -> None:
    missing: tuple[Reason, str] = ("bad data", "/runs/x/0001/part-3: no such file")
    alike = failures(missing, ("bad data", "/runs/x/0002/part-4: no such file"), missing)
    assert common_fault(alike[:2]) is None
    said = common_fault(alike)
    assert said is not None
    assert "bad data: /runs/x/0001/part-3: no such file" in said
    assert "\n" not in said
    assert common_fault([*alike, TrialRecord(3, "RUNNING", {}, None, {}, 0, {}, "running")]) == said
    assert common_fault(failures(("error", "a"), missing, missing, missing)) is not None, "the last ones count"


def test_other_failures_do_not_end_a_sweep() -> None:
    missing: tuple[Reason, str] = ("bad data", "no such file")
    assert common_fault([]) is None
    assert common_fault(failures(missing, missing, ("error", "no such file"))) is None
    assert common_fault(failures(missing, missing, ("bad data", "damaged"))) is None
    for state in ("COMPLETE", "PRUNED"):
        done = TrialRecord(9, state, {}, 0.5, {}, 1, {1: 0.5}, "trained to the end")
        assert common_fault([done, *failures(missing, missing, missing)]) is None


@pytest.mark.parametrize("reason", ["out of memory", "non-finite"])
def test_what_other_parameters_may_avoid_is_given_more_trials(reason: Reason) -> None:
    alike = failures(*[(reason, f"at step {number}") for number in range(6)])
    assert common_fault(alike[:5]) is None
    assert common_fault(alike) is not None


def test_steps_of_an_axis_hold_for_points() -> None:
    def config(point: float) -> Config:
        axis = {"low": 0.0, "high": 0.5, "step": 0.1}
        return parse(
            {"name": "a", "search": {"space": {"train.warmup": axis}, "points": [{"train.warmup": point}]}}, "a"
        )

    axis = config(0.3).search.space["train.warmup"]
    assert [axis.contains(value) for value in (0.0, 0.1, 0.3, 0.5, 0.35, 0.6)] == [True] * 4 + [False] * 2
