"""The study as Tune sees it: which trials start, what each end of a trial means, and when a sweep is aborted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray.tune.search import Searcher

from data.errors import ConfigError
from sweep.durability.lease import LeaseLostError
from sweep.execution.tune import StudySearcher
from sweep.search.study import StudyStore
from tests.sweep.common import settings


def make(folder: Path, **changed: Callable[..., object]) -> StudySearcher:
    """Return a searcher whose jobs are trial numbers."""
    callbacks: dict[str, Any] = {
        "make_job": lambda number, values: {"number": number},
        "check": Mock(),
        "stop": Mock(),
        "ended": Mock(),
    }
    return StudySearcher(StudyStore.open(folder, settings(trials=5)), **callbacks | changed)


def states(searcher: StudySearcher) -> list[tuple[str, str | None]]:
    return [(trial.state, trial.reason) for trial in searcher.study.trials()]


def end_each(searcher: StudySearcher, *results: dict[str, Any] | None) -> None:
    """Start a trial for each result, and end it with the result; None is an error of Tune's."""
    for number, result in enumerate(results):
        searcher.suggest(str(number))
        searcher.on_trial_complete(str(number), result, error=result is None)


def failed(why: str, reason: str = "error", common: bool = False) -> dict[str, Any]:
    return {"failed": why, "reason": reason, "common": common}


def test_each_end_of_a_trial_is_recorded(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("0")
    searcher.report("0", {"epoch": 1, "metrics": '{"macro_f1": 0.5, "steps": 3}'})
    searcher.on_trial_complete("0", {"finished": True})
    end_each(searcher, failed("no number", "non-finite"), None, {"interrupted": True})
    ends = [("COMPLETE", None), ("FAIL", "non-finite"), ("FAIL", "workers lost"), ("RUNNING", None)]
    assert (states(searcher), searcher.numbers) == (ends, {})
    assert (searcher.stop.call_count, searcher.ended.call_count) == (0, 4)
    assert searcher.suggest("resumed") == {"job": {"number": 3}}


def test_common_failure_aborts_the_sweep_and_fails_no_trial(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("running")
    end_each(searcher, failed("the disk is full", common=True))
    assert states(searcher) == [("RUNNING", None), ("RUNNING", None)]
    assert (searcher.fault, searcher.stop.call_count) == (("the disk is full", "error"), 1)
    assert searcher.suggest("more") == Searcher.FINISHED
    searcher.on_trial_complete("running", None, error=True)  # its worker group was shut down
    assert states(searcher)[0] == ("RUNNING", None)


def test_equal_failures_abort_the_sweep(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    end_each(searcher, *(failed(f"no file at step {step}") for step in (3, 14, 159)))
    assert searcher.fault is not None
    assert "no file" in searcher.fault[0]
    assert (searcher.stop.call_count, searcher.suggest("more")) == (1, Searcher.FINISHED)


def test_impossible_combination_fails_only_its_trial(tmp_path: Path) -> None:
    searcher = make(tmp_path, make_job=Mock(side_effect=[ConfigError("window below stride"), {"number": 1}]))
    assert searcher.suggest("0") == {"job": {"number": 1}}
    assert states(searcher) == [("FAIL", "error"), ("RUNNING", None)]


def test_searcher_writes_nothing_once_the_lease_is_lost(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("0")
    searcher.check = Mock(side_effect=LeaseLostError)
    calls: list[Callable[[], object]] = [
        lambda: searcher.suggest("1"),
        lambda: searcher.report("0", {"epoch": 1, "metrics": '{"macro_f1": 1}'}),
        lambda: searcher.on_trial_complete("0", {"finished": True}),
    ]
    before = (tmp_path / "study.journal").read_bytes()
    for call in calls:
        with pytest.raises(LeaseLostError):
            call()
    assert (tmp_path / "study.journal").read_bytes() == before
