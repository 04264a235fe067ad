"""The study as Tune sees it: which trials start, what each end of a trial means, and when a sweep is aborted."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray.tune.search import Searcher

from data.errors import ConfigError
from sweep.durability.lease import LeaseLostError
from sweep.execution.job import Standby, Task
from sweep.execution.tasks import QueueClosedError, TaskQueue
from sweep.execution.tune import StudySearcher
from sweep.execution.waiting import Work
from sweep.search.study import StudyStore
from tests.sweep.common import settings


def make(folder: Path, **changed: Any) -> StudySearcher:
    """Return a searcher whose jobs are trial numbers."""
    queue = TaskQueue()
    queue.waits = lambda values: False
    callbacks: dict[str, Any] = {
        "queue": queue,
        "make_job": lambda number, values: {"number": number},
        "check": Mock(),
        "stop": Mock(),
        "ended": Mock(),
    }
    study = changed.pop("study", None) or StudyStore.open(folder, settings(trials=5))
    return StudySearcher(study, **callbacks | changed)


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


def test_trials_that_wait_change_no_result(tmp_path: Path) -> None:
    """One worker group: trials without speech start at once, nothing is drawn too early, and a kill changes nothing."""
    config = settings(sampler="tpe")

    def play(name: str, waiting: bool, killed_after: int = 99) -> list[int]:
        (folder := tmp_path / name).mkdir(exist_ok=True)
        searcher = make(folder, study=StudyStore.open(folder, config), make_job=lambda number, _: number)
        searcher.queue.waits = lambda values: waiting and values["model.modality"] == "speech"
        started: list[int] = []
        while (suggested := searcher.suggest(name)) != Searcher.FINISHED and len(started) < killed_after:
            assert isinstance(suggested, dict)
            if isinstance(suggested["job"], Standby):
                searcher.queue.waits = lambda values: False
                continue
            started.append(number := suggested["job"])
            values = searcher.study.trials()[number].params
            score = values["train.learning_rate"] * values["model.lora.rank"]
            searcher.report(name, {"epoch": 1, "metrics": json.dumps({"macro_f1": score, "steps": 1})})
            searcher.on_trial_complete(name, {"finished": True})
        return started

    assert play("foreground", waiting=False) == list(range(9))
    order = play("background", waiting=True)
    assert sorted(order) == list(range(9)) != order
    first = play("killed", waiting=True, killed_after=2)
    assert first == order[:2]
    assert [*first, *play("killed", waiting=True)] == order
    foreground, *others = (StudyStore.read(tmp_path / name, config) for name in ("foreground", "background", "killed"))
    assert [study.trials() for study in others] == [foreground.trials()] * 2


def test_tasks_come_first_while_a_trial_runs(tmp_path: Path) -> None:
    """A free worker group starts a trial if none runs; else it does tasks, and stands by if trials wait for them."""
    searcher, ended = make(tmp_path, make_job=lambda number, _: number), list[tuple[int, list[str] | None]]()
    queue = searcher.queue
    queue.waits = None
    assert searcher.suggest("before the plan") == {"job": Standby(0)}
    queue.waits = lambda values: values["model.modality"] == "speech"
    queue.announce = Mock()
    thread = Work(lambda: ended.extend(queue.run([lambda: [str]] * 3, at_once=2)), "tasks")
    while not queue.announce.called:
        time.sleep(0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.put", lambda calls: calls)
        jobs = [searcher.suggest(name)["job"] for name in "abc"]
        assert jobs[0] == 0
        assert [job.calls for job in jobs[1:]] == [[str], [str]]
        assert searcher.suggest("d") == {"job": 3}, "no more than two tasks at a time; trials 1 and 2 wait"
        searcher.on_trial_complete("b", {"finished": True, "results": [""]})
        assert isinstance(searcher.suggest("e")["job"], Task)
        searcher.on_trial_complete("c", None, error=True)
        searcher.on_trial_complete("e", {"failed": "died", "reason": "workers lost"})
    thread.join(5)
    assert ended == [(0, [""]), (1, None), (2, None)]
    queue.close()
    with pytest.raises(QueueClosedError):
        next(queue.run([list], at_once=1))
