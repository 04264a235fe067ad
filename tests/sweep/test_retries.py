"""Trials that failed for a cause outside their configuration run again under their number, once in every command."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
from mlflow import MlflowClient
from ray.exceptions import ActorDiedError

from data.errors import ConfigError, DataError, MisfitError, StorageError, UnavailableError
from model.checkpoints.checkpoint import CheckpointError, CheckpointMisfitError
from model.runtime.memory import OutOfMemoryError
from model.training.loss_accumulator import NonFiniteError
from sweep.config.paths import trial_folder
from sweep.config.resolve import ResolvedConfig
from sweep.execution import worker
from sweep.preflight.preview import preview
from sweep.runner import SweepRunner
from sweep.search.study import StudyStore
from sweep.search.study_storage import FILE
from sweep.tracking.access import tracking_uri
from sweep.tracking.tracker import mlflow_run_id
from tests.sweep.common import ask, play, report, sweep
from tests.sweep.stores import every_storage, postgres, pruned, settings, shared_sqlite, storage  # noqa: F401
from tests.sweep.test_executor import end_each, failed, make, states
from tests.sweep.tracked import CONFIG, append, make_sweep, runs, track

LOST = "its workers were lost too often"


@every_storage
def test_failure_outside_runs_again_under_its_number(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 3)
    report(study, 1, 0.5, 0.6)
    study.fail(0, "non-finite loss at step 3", reason="non-finite")
    study.fail(1, LOST, reason="workers lost")
    before = study.trials()[1]
    assert [trial.number for trial in study.failed_outside()] == [1]
    assert study.retry() == [before]
    study = StudyStore.open(tmp_path, pruned())
    again = study.trials()[1]
    assert (again.number, again.state, again.params) == (1, "RUNNING", before.params)
    assert (again.curve, again.metrics, again.reason) == (before.curve, before.metrics, None)
    assert [study.ask([2], 9), study.running()] == [(1, before.params), [1, 2]]
    assert (study.retry(), len(study.trials())) == ([], 3)
    report(study, 1, 0.5, 0.6, 0.7, 0.8)
    study.complete(1)
    ended = StudyStore.read(tmp_path, pruned()).trials()
    assert [trial.state for trial in ended] == ["FAIL", "COMPLETE", "RUNNING"]
    assert (ended[1].value, ended[1].why, study.points_left()) == (0.8, "trained to the end", [])


def test_search_after_a_retry_draws_the_same_trials(tmp_path: Path) -> None:
    for name in ("smooth", "broken"):
        (tmp_path / name).mkdir()
    smooth, broken = (StudyStore.open(tmp_path / name, settings(trials=12)) for name in ("smooth", "broken"))
    expected = list(play(smooth, 12))
    ask(broken, 1)
    broken.fail(0, LOST, reason="workers lost")
    broken.retry()
    assert list(play(broken, 12)) == expected
    assert [(trial.number, trial.value) for trial in broken.trials()] == [(t.number, t.value) for t in smooth.trials()]


def test_failure_again_waits_for_the_next_command(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    for attempt in range(3):
        ask(study, 1)
        study.fail(0, f"{LOST} {attempt}", reason="workers lost")
        assert study.ask([], 1) is None
        assert [trial.number for trial in study.retry()] == [0]
    study.fail(0, "out of memory", reason="out of memory")
    assert (study.retry(), len(study.trials())) == ([], 1)


@pytest.mark.parametrize(("reason", "runs_again"), [("bad data", True), ("workers lost", True), ("error", False)])
def test_failures_of_earlier_versions_have_a_reason_only(reason: str, runs_again: bool, tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 1)
    study.fail(0, "as before", reason=reason)  # type: ignore[arg-type]
    lines = (tmp_path / FILE).read_text().splitlines()
    (tmp_path / FILE).write_text("".join(f"{line}\n" for line in lines if '"outside"' not in line))
    study = StudyStore.open(tmp_path, settings())
    assert "outside" not in study.study.trials[0].user_attrs
    assert bool(study.retry()) == runs_again


def test_optuna_sees_each_run_of_a_trial(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings())
    ask(study, 2)
    study.fail(0, LOST, reason="workers lost")
    study.retry()
    study.fail(1, "an exception")
    assert [trial.state.name for trial in study.study.trials] == ["FAIL", "FAIL", "RUNNING"]
    assert study.study.trials[2].user_attrs == {"retry_of": 0}
    assert ask(study, 2)[1][0] == 2
    report(study, 2, 0.5)
    assert study.study.trials[3].intermediate_values == {1: 0.5}
    assert isinstance(study.study, optuna.Study)


def test_common_faults_run_again(tmp_path: Path) -> None:
    """Three trials fail alike with an exception that says nothing by itself: the sweep stops, and none is lost."""
    searcher = make(tmp_path)
    end_each(searcher, *(failed(f"ImportError: no module at step {step}") for step in (3, 14, 159)))
    assert searcher.fault is not None
    assert [trial.number for trial in searcher.study.retry()] == [0, 1, 2]


def test_same_failures_outside_end_the_sweep_after_successes(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    gone = failed("model.llm.path: cannot load") | {"outside": True}
    end_each(searcher, {"interrupted": True})
    report(searcher.study, 0, 0.5)
    end_each(searcher, {"finished": True}, gone, gone, gone)
    assert searcher.fault == (
        "the last 3 trials failed alike (error: model.llm.path: cannot load); fix this first",
        "error",
    )
    assert [trial.number for trial in searcher.study.retry()] == [1, 2, 3]


def test_file_that_is_missing_when_a_trial_starts(tmp_path: Path) -> None:
    searcher = make(tmp_path, make_job=Mock(side_effect=[UnavailableError("x: no such file"), {"number": 1}]))
    assert searcher.suggest("0") == {"job": {"number": 1}}
    assert [trial.number for trial in searcher.study.failed_outside()] == [0]
    (tmp_path / "full").mkdir()
    full = make(tmp_path / "full", make_job=Mock(side_effect=StorageError("the disk is full")))
    assert (full.suggest("0"), full.fault, states(full)) == (
        "FINISHED",
        ("the disk is full", "error"),
        [("RUNNING", None)],
    )


@pytest.mark.parametrize(
    ("error", "outside"),
    [
        (DataError("shard"), True),
        (MisfitError("no items"), False),
        (StorageError("full"), True),
        (UnavailableError("no weights"), True),
        (ConfigError("rank"), False),
        (CheckpointError("damaged"), True),
        (CheckpointMisfitError("rank"), False),
        (NonFiniteError("loss"), False),
        (OutOfMemoryError("one example"), False),
        (FileNotFoundError(2, "gone"), True),
        (ConnectionResetError(), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (ValueError("shapes"), False),
    ],
)
def test_error_says_whether_its_cause_is_outside(
    error: Exception, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mailbox = Mock()
    monkeypatch.setattr(worker.ray, "get", lambda reference: reference)
    worker.report_failure(mailbox, 1, error, alone=True)
    assert mailbox.fail.remote.call_args.kwargs["final"]
    assert mailbox.fail.remote.call_args.kwargs["outside"] == outside


def test_lost_actor_is_not_final(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mock()
    monkeypatch.setattr(worker.ray, "get", lambda reference: reference)
    worker.report_failure(mailbox, 1, ActorDiedError(), alone=True)
    assert not mailbox.fail.remote.call_args.kwargs["final"]


def test_run_of_a_failed_trial_continues_in_mlflow(database: Path, tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep", database)
    study = StudyStore.open(folder, CONFIG)
    study.fail(3, "a node went away", reason="workers lost")
    track(folder)
    run_id, client = mlflow_run_id(folder, 3), MlflowClient(tracking_uri(folder))
    assert client.get_run(run_id).data.tags.items() >= {"sweep.state": "FAIL", "sweep.reason": "workers lost"}.items()
    study.retry()
    track(folder)
    run = client.get_run(run_id)
    assert (run.info.status, [tag for tag in run.data.tags if tag in ("sweep.state", "sweep.reason", "sweep.why")]) == (
        "SCHEDULED",
        [],
    )
    report(study, 3, 0.95, 0.96)
    append(folder, 3, (48, 1005.0, 0.3))
    study.complete(3)
    track(folder)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["sweep.state"], "sweep.reason" in run.data.tags) == (
        "FINISHED",
        "COMPLETE",
        False,
    )
    assert run.info.end_time == 1005000
    assert [child.info.run_id for child in runs(folder)[1]] == [mlflow_run_id(folder, number) for number in range(4)]


@pytest.fixture
def flaky(here: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which trial 1 fails while there is a file `broken`, and none is trained."""

    def execute(self: SweepRunner, resolved: ResolvedConfig) -> None:
        self.study.retry()
        while (asked := self.study.ask([], self.config.search.trials)) is not None:
            self.make_job(resolved, *asked)
            if asked[0] == 1 and (here / "broken").exists():
                self.study.fail(1, "no weights", outside=True)
            else:
                self.study.report(asked[0], 1, {"macro_f1": 0.5, "steps": 3})
                self.study.complete(asked[0])

    monkeypatch.setattr(SweepRunner, "execute", execute)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (here / "runs").mkdir()
    shutil.copy(database, here / "runs")
    (here / "broken").touch()
    return here


def test_same_command_runs_a_failed_trial_again(flaky: Path) -> None:
    def states() -> list[str]:
        return [trial["state"] for trial in json.loads(sweep("status", "runs/t", "--json").out)["trials"]]

    space = "search.space.train.learning_rate=[0.01, 0.02, 0.03]"
    command: tuple[Any, ...] = ("run", "good.yaml", "--set", "train.epochs=1", "--set", space, "--trials", 3)
    line = "trial 1 failed for a cause outside its configuration (no weights); it runs again"
    first = sweep(*command)
    assert (first.code, line in first.out, states()) == (0, False, ["COMPLETE", "FAIL", "COMPLETE"])
    assert "#1 no weights (outside its configuration: the same `sweep run` runs it again)" in first.out
    study = StudyStore.of(flaky / "runs/t")
    assert [number for number, _ in preview(study.config, flaky / "runs/t", None).resumed] == [1]
    second = sweep(*command)
    assert (second.code, line in second.out, states()) == (0, True, ["COMPLETE", "FAIL", "COMPLETE"])
    (flaky / "broken").unlink()
    third, runs_before = sweep(*command), mlflow_run_id(flaky / "runs/t", 1)
    assert (third.code, line in third.out, states()) == (0, True, ["COMPLETE"] * 3)
    last = sweep(*command)
    assert (last.code, line in last.out, mlflow_run_id(flaky / "runs/t", 1)) == (0, False, runs_before)
    assert json.loads((trial_folder(flaky / "runs/t", 1) / "mlflow.json").read_text())["ended"]
