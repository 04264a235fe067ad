"""Whatever happens, the last line of a command says how it ended."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from sweep.cli import results, run
from sweep.config.resolve import ResolvedConfig
from sweep.execution import cluster, orphans
from sweep.execution.cluster import ClusterError, ClusterLostError, local_or_remote_ray
from sweep.execution.tune import BackgroundWork
from sweep.execution.waiting import LimitExceededError, within
from sweep.runner import SweepRunner
from sweep.tracking.tracker import Tracker
from tests.sweep.common import sweep

KILLED = """
import os, signal, sys
from sweep.execution.signals import exit_line
with exit_line("unfinished: 'killed' $HOME"):
    if sys.argv[1] != "end":
        os.kill(os.getpid(), int(sys.argv[1]))
    print("said")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_line_of_a_killed_process_is_written(number: signal.Signals) -> None:
    command = [sys.executable, "-c", KILLED]
    killed = subprocess.run([*command, str(int(number))], capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stdout, killed.stderr) == (-number, "", "unfinished: 'killed' $HOME\n")
    ended = subprocess.run([*command, "end"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "said\n", "")


HANGING = """
import atexit, threading, time
from sweep.cli import app
from sweep.execution.waiting import Work

def ended():
    print("ended", flush=True)
    Work(threading.Event().wait, "hangs")
    atexit.register(time.sleep, 600)
    raise SystemExit(75)

app.app = ended
app.main()
"""


def test_calls_that_hang_do_not_hold_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (75, "ended\n"), done.stderr


@pytest.fixture
def folder(here: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which no trial is trained."""

    def execute(self: SweepRunner, resolved: ResolvedConfig) -> None:
        while (asked := self.study.ask([], self.config.search.trials)) is not None:
            self.study.report(asked[0], 1, {"macro_f1": 0.5 + asked[0] / 10, "loss": 1.0, "steps": 3})
            self.study.complete(asked[0])

    monkeypatch.setattr(SweepRunner, "execute", execute)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (here / "runs").mkdir()
    shutil.copy(database, here / "runs")
    return here


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("out of\norder")


def test_error_of_a_clean_up_does_not_hide_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "finish", broken)
    ended = sweep("run", "good.yaml", "--trials", 1)
    lines = ended.out.splitlines()
    assert (ended.code, lines[-1]) == (75, "unfinished: MLflow lacks some results; rerun the same command to send them")
    assert any("could not send the last results to MLflow (out of)" in line for line in lines)


def test_results_that_cannot_be_shown_do_not_hide_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "show_trials", broken)
    ended = sweep("run", "good.yaml", "--trials", 1)
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "done: 1 complete; the best is trial 0 (runs/t)")
    assert ended.err == "error: the results cannot be shown (RuntimeError: out of); try `sweep status`\n"


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (ClusterLostError("the cluster is gone"), 75, "unfinished: the cluster is gone (runs/t)"),
        (ClusterError("there is no cluster"), 1, "error: there is no cluster"),
        (RuntimeError("odd"), 1, "error: unexpected RuntimeError: odd; this is a fault of the program, see above"),
        (KeyboardInterrupt(), 75, "stopped; rerun the same command to resume (runs/t)"),
    ],
)
def test_run_that_raises_ends_with_a_line(
    error: BaseException, code: int, last: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(self: SweepRunner, resolved: ResolvedConfig) -> None:
        raise error

    monkeypatch.setattr(SweepRunner, "execute", execute)
    ended = sweep("run", "good.yaml", "--trials", 1)
    assert (ended.code, (ended.err or ended.out).splitlines()[-1]) == (code, last)


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (PermissionError(13, "Permission denied"), 1, "error: [Errno 13] Permission denied; fix this and rerun the"),
        (AssertionError(), 1, "error: unexpected AssertionError: AssertionError; this is a fault of the program"),
    ],
)
def test_other_commands_end_with_a_line(
    error: BaseException, code: int, last: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_study_store(folder: Path) -> None:
        raise error

    monkeypatch.setattr(results, "open_study_store", open_study_store)
    ended = sweep("status", "runs/t")
    assert (ended.code, ended.err.splitlines()[-1].startswith(last)) == (code, True), ended.err


def test_ray_that_cannot_be_cleaned_up_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of the block is what the caller sees, and not that of the clean-up."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_start_once", lambda scratch: None)
    monkeypatch.setattr(ray, "shutdown", broken)
    monkeypatch.setattr(orphans, "end_orphans", broken)
    lines: list[str] = []
    with pytest.raises(ValueError, match="of the block"), local_or_remote_ray(tmp_path, lines.append):
        raise ValueError("of the block")
    assert lines == ["could not disconnect from Ray (out of)", "could not end the recorded processes of Ray (out of)"]
    assert not {"RAY_AUTH_TOKEN_PATH", orphans.MARK} & os.environ.keys()


@pytest.mark.parametrize(
    "error", [RuntimeError("Tune"), ClusterError("precompute"), ray.exceptions.RaySystemError("x")]
)
def test_error_of_a_cluster_that_is_gone_is_its_end(error: Exception) -> None:
    def work() -> None:
        raise error

    def gone(after_error: bool = False) -> None:
        if after_error:
            raise ClusterLostError("gone")

    with pytest.raises(ClusterLostError):
        BackgroundWork(work, "work", gone).result()
    wanted = RuntimeError if isinstance(error, RuntimeError) else ClusterError
    with pytest.raises(wanted):
        BackgroundWork(work, "work", lambda after_error=False: None).result()


def test_call_within_a_limit() -> None:
    started: list[threading.Thread] = []
    assert within(5, lambda: 7, "work") == 7
    with pytest.raises(ValueError, match="of the call"):
        within(5, lambda: (_ for _ in ()).throw(ValueError("of the call")), "work")
    with pytest.raises(LimitExceededError, match="no answer within 0 s"):
        within(0.3, lambda: time.sleep(2), "work")
    within(5, lambda: started.append(threading.current_thread()), "work", stay := threading.Event())
    assert started[0].is_alive()
    stay.set()
    started[0].join(5)
    assert not started[0].is_alive()
