"""`run_sweep` from Python, in a notebook and in a thread, and what each end of a sweep is to its caller."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from optuna.exceptions import StorageInternalError

from data.errors import ConfigError
from sweep import run_sweep, runner
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import parse
from sweep.durability.lease import LeaseHeldError
from sweep.execution.cluster import ClusterError, RayStart
from sweep.execution.tune import SweepAbortedError
from sweep.runner import Outcome, SweepRunner
from sweep.search.study import TrialRecord
from tests.sweep.common import sweep

(EXAMPLE,) = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/sweep.md").read_text(encoding="utf-8"), flags=re.DOTALL
)


@pytest.fixture
def notebook(here: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which trials get a value each, and none is trained."""

    def execute(self: SweepRunner, resolved: ResolvedConfig) -> None:
        while (asked := self.study.ask([], self.config.search.trials)) is not None:
            self.make_job(resolved, *asked)
            self.study.report(asked[0], 1, {"macro_f1": 0.5 + asked[0] / 10, "loss": 1.0, "steps": 3})
            self.study.complete(asked[0])
            if asked[0] == 1 and not self.folder.name.startswith("all"):
                return self.stop.requested.set()  # as a signal does
        return None

    settings = json.loads((here / "good.yaml").read_text()) | {"search": {"space": {"seed": {"low": 0, "high": 99}}}}
    (here / "good.yaml").write_text(json.dumps(settings))
    monkeypatch.setattr(SweepRunner, "execute", execute)
    # Ray may end the process in which its start is given up, as after bad inputs, so only a command starts it early.
    monkeypatch.setattr(RayStart, "_begin", lambda *_: pytest.fail("Ray would start in this process"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (here / "runs").mkdir()
    shutil.copy(database, here / "runs")
    return here


def test_example_of_the_docs_runs_in_a_notebook(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook runs its cells inside an event loop."""
    cell = EXAMPLE.replace('"demo"', '"good.yaml"').replace('"runs/from-python"', '"runs/all"')
    assert cell.count("all") > EXAMPLE.count("all")

    async def run_cell() -> dict[str, object]:
        exec(cell, names := dict[str, object]())
        return names

    outcome = asyncio.run(run_cell())["outcome"]
    assert isinstance(outcome, Outcome)
    assert (outcome.state, outcome.exit_code, outcome.folder) == ("done", 0, Path("runs/all"))
    assert outcome.message == "done: 4 complete; the best is trial 3 (runs/all)"
    assert all(isinstance(trial, TrialRecord) for trial in outcome.trials)
    assert outcome.best is outcome.trials[3]
    assert "best=trial 3, macro_f1 0.800" in repr(outcome)
    assert "<td>1</td><td>COMPLETE</td><td>0.600</td>" in outcome._repr_html_()
    printed = capsys.readouterr().out
    assert "parts of the model" in printed
    assert "trial 1 COMPLETE: macro_f1 0.600" in printed


def test_sweep_resumes_in_a_thread_and_prints_nothing(
    notebook: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "answer_problems", lambda shards, names: [f"{name}: one label" for name in names])
    outcomes: list[Outcome] = []

    def call() -> None:
        outcomes.append(run_sweep(notebook / "good.yaml", {"train.epochs": 1}, trials=3, progress=False))

    for _ in range(2):
        (thread := threading.Thread(target=call)).start()
        thread.join()
    first, second = outcomes
    message = "unfinished: 1 trial is left; rerun the same command to resume"
    assert (first.state, first.exit_code, first.message, len(first.trials)) == ("unfinished", 75, message, 2)
    assert (second.state, second.folder, second.trials[:2]) == ("done", Path("runs/t"), first.trials)
    assert capsys.readouterr().out == ""
    ended = sweep("run", "good.yaml", "--set", "train.epochs=1", "--trials", 3)
    assert (ended.code, ended.out.splitlines()[-1]) == (0, second.message)
    assert re.search(r"^2 +COMPLETE +0.70", ended.out, flags=re.MULTILINE)
    assert re.search(r"^reproduce:  .*sweep train runs/t/config.yaml", ended.out, flags=re.MULTILINE)
    assert ended.out.index("warning: classify: one label") < ended.out.index("COMPLETE")


def test_exhausted_space_ends_the_sweep_with_a_line(notebook: Path) -> None:
    """Two configurations and four trials; the command is done, also when it is given again."""
    command = ("run", "good.yaml", "--trials", 4, "--set", "search.space={seed: null, train.warmup: [0, 0.1]}")
    before = sweep(*command, "--dry-run")
    assert before.code == 0
    assert "search.trials: 4, and search.space has 2 different trials, after which the sweep ends" in before.out
    assert "2 drawn by the search" in before.out
    last = "done: 2 complete, which is all of search.space (search.trials is 4); the best is trial 1 (runs/t)"
    for _ in range(2):
        ended = sweep(*command)
        assert (ended.code, ended.out.splitlines()[-1]) == (0, last)
        assert len(re.findall(r"^\d +COMPLETE", ended.out, flags=re.MULTILINE)) == 2
    assert "t: 2/2 trials done" in (shown := sweep("status", "runs/t").out)
    assert "finished" in shown


@pytest.mark.parametrize(
    ("error", "state", "code", "message"),
    [
        (SweepAbortedError("a corrupt shard", "bad data"), "failed", 2, "a corrupt shard; the sweep was stopped"),
        (SweepAbortedError("the disk is full", "error"), "failed", 1, "the disk is full; the sweep was stopped"),
        (LeaseHeldError("runs/x: another `sweep run`"), "failed", 1, "runs/x: another `sweep run`"),
        (ClusterError("Ray does not start"), "failed", 1, "Ray does not start"),
        (PermissionError(13, "Permission denied"), "failed", 1, "x: [Errno 13] Permission denied; fix this and"),
        (StorageInternalError("away"), "failed", 1, "x: the connection to the study's database was lost"),
        (KeyboardInterrupt(), "unfinished", 75, "stopped; rerun the same command to resume (x)"),
    ],
)
def test_each_end_is_an_outcome(
    error: BaseException, state: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_run", Mock(side_effect=error))
    outcome = runner.run(parse({"name": "x"}, "test"), Path("x"))
    assert (outcome.state, outcome.exit_code, outcome.trials, outcome.best) == (state, code, [], None)
    assert outcome.message.startswith(message)


def test_bad_settings_are_raised(notebook: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        run_sweep("good.yaml", {"train.epoch": 3})
    assert not (notebook / "runs/t").exists()


def test_importing_sweep_is_light() -> None:
    code = "import sys, sweep; print({'torch', 'ray', 'mlflow', 'optuna', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
