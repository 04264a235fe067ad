"""The ledger as Tune sees it: what is handed out, what each end of a trial means, and when a sweep gives up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from data.errors import ConfigError
from sweep.execution.tune import StudySearcher
from sweep.search.study import StudyStore
from tests.sweep.common import settings


class Calls:
    """Counts what the searcher asks of its driver."""

    def __init__(self) -> None:
        self.stopped = self.ended = 0

    def stop(self) -> None:
        self.stopped += 1

    def end(self) -> None:
        self.ended += 1


def make(
    folder: Path, job: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda number, values: {"number": number}
) -> tuple[StudySearcher, Calls]:
    calls = Calls()
    study = StudyStore.open(folder, settings(trials=5))
    return StudySearcher(study, job, lambda: None, calls.stop, calls.end), calls


def states(searcher: StudySearcher) -> list[tuple[str, str | None]]:
    return [(entry.state, entry.reason) for entry in searcher.study.trials()]


def ends(searcher: StudySearcher, *results: dict[str, Any] | None) -> list[int]:
    """Each result ends a trial of its own; how many are still known to run."""
    for number, result in enumerate(results):
        searcher.suggest(str(number))
        searcher.on_trial_complete(str(number), result, error=result is None)
    return list(searcher.numbers.values())


def test_each_end_is_told_for_what_it_is(tmp_path: Path) -> None:
    searcher, calls = make(tmp_path)
    searcher.suggest("0")
    searcher.report("0", {"epoch": 1, "metrics": '{"macro_f1": 0.5, "steps": 3}'})
    searcher.on_trial_complete("0", {"finished": True})
    failed = {"failed": "no number", "reason": "non-finite", "common": False}
    assert ends(searcher, failed, None, {"interrupted": True}) == []
    assert states(searcher) == [
        ("COMPLETE", None),
        ("FAIL", "non-finite"),
        ("FAIL", "workers lost"),
        ("RUNNING", None),
    ]
    assert (calls.stopped, calls.ended) == (0, 4)
    assert searcher.suggest("again") == {"job": {"number": 3}}  # the one that was interrupted


def test_what_hits_every_trial_stops_the_sweep_and_fails_none(tmp_path: Path) -> None:
    searcher, calls = make(tmp_path)
    searcher.suggest("other")
    ends(searcher, {"failed": "the disk is full", "reason": "error", "common": True})
    assert states(searcher) == [("RUNNING", None), ("RUNNING", None)]
    assert (searcher.fault, calls.stopped) == (("the disk is full", "error"), 1)
    assert searcher.suggest("more") == Searcher.FINISHED
    searcher.on_trial_complete("other", None, error=True)  # its slot was shut down
    assert states(searcher)[0] == ("RUNNING", None)


def test_trials_that_all_fail_alike_stop_the_sweep(tmp_path: Path) -> None:
    searcher, calls = make(tmp_path)
    failed = [{"failed": f"no file at step {step}", "reason": "error", "common": False} for step in (3, 14, 159)]
    ends(searcher, *failed)
    assert searcher.fault is not None
    assert "no file" in searcher.fault[0]
    assert (calls.stopped, searcher.suggest("more")) == (1, Searcher.FINISHED)


def test_values_that_do_not_go_together_fail_by_themselves(tmp_path: Path) -> None:
    def job(number: int, values: dict[str, Any]) -> dict[str, Any]:
        if number == 0:
            raise ConfigError("window below stride")
        return {"number": number}

    searcher, _ = make(tmp_path, job)
    assert searcher.suggest("0") == {"job": {"number": 1}}
    assert states(searcher) == [("FAIL", "error"), ("RUNNING", None)]


def test_a_driver_that_lost_its_sweep_writes_nothing(tmp_path: Path) -> None:
    class LostError(Exception):
        pass

    def check() -> None:
        raise LostError

    searcher, _ = make(tmp_path)
    searcher.suggest("0")
    searcher.check = check
    calls: list[Callable[[], object]] = [
        lambda: searcher.suggest("1"),
        lambda: searcher.report("0", {"epoch": 1, "metrics": '{"macro_f1": 1}'}),
        lambda: searcher.on_trial_complete("0", {"finished": True}),
    ]
    before = (tmp_path / "study.journal").read_bytes()
    for call in calls:
        with pytest.raises(LostError):
            call()
    assert (tmp_path / "study.journal").read_bytes() == before
