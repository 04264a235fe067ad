"""Small sweeps whose trials are reported by hand, and commands that run in this process."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sweep.cli.app import main
from sweep.config.schema import Config, parse
from sweep.execution.cluster import RayStart
from sweep.execution.signals import StopRequest
from sweep.runner import Silent, SweepRunner
from sweep.search.study import StudyStore
from tests.conftest import LABELS

FROZEN, TUNED = "adapter+lora+tokens", "encoder+adapter+lora+tokens"
POINTS = [{"model.lora.rank": 2, "train.learning_rate": 3e-3, "model.modality": "text"}, {"model.lora.rank": 16}]
SPACE = {
    "model.modality": ["speech", "text"],
    "model.lora.rank": [2, 8, 16],
    "train.learning_rate": {"low": 5e-4, "high": 1e-2, "log": True},
    "model.trainable": {"choices": [FROZEN, TUNED], "when": {"model.modality": ["speech"]}},
}
# As a trial writes them: of a code and of a reply.
SAID = {"conversation": "c", "speaker": "client", "subset": None, "loss": 1.0, "tokens": 2, "ended": True}
CODE = SAID | {"task": "classify", "label": "change", "prediction": "neutral", "scores": [-3.0, -2.0, -1.0]}
REPLY = SAID | {"task": "response", "label": "go on", "prediction": "tell me more", "scores": []}
PREDICTIONS = {
    "labels": {"classify": LABELS, "response": []},
    "records": [CODE | {"id": "c/1"}, CODE | {"id": "c/3"}, REPLY | {"id": "c/2"}],
}
Asked = tuple[int, dict[str, Any]]


def settings(**search: Any) -> Config:
    """Return a sweep of nine trials in four dimensions."""
    defaults = {"trials": 9, "startup_trials": 4, "space": SPACE, "points": POINTS, "pruning": None}
    return parse({"name": "test", "train": {"epochs": 4}, "search": defaults | search}, "test")


def pruned(audit: float = 0.0, **search: Any) -> Config:
    """Return the same sweep with pruning."""
    return settings(pruning={"first_epoch": 2, "after_trials": 4, "audit": audit}, **search)


def ask(study: StudyStore, count: int) -> list[Asked]:
    """Start trials that run at the same time."""
    running: list[Asked] = []
    for _ in range(count):
        asked = study.ask([number for number, _ in running], 99)
        assert asked is not None
        running.append(asked)
    return running


def report(study: StudyStore, number: int, *values: float) -> list[bool]:
    """Report the epochs of a trial from the first one, also when it resumes after a kill."""
    name = study.config.search.metric
    epochs = enumerate(values, start=1)
    return [study.report(number, epoch, {name: value, "steps": 10 * epoch}) for epoch, value in epochs]


def play(study: StudyStore, target: int) -> Iterator[Asked]:
    """Run trials to their ends, one after another; the values are a function of the number."""
    while (asked := study.ask([], target)) is not None:
        number = asked[0]
        if not any(report(study, number, *(number * 7 % 5 + epoch for epoch in range(4)))):
            study.complete(number)
        yield asked


def whole_and_resumed(folder: Path, config: Config) -> tuple[list[Asked], list[Asked]]:
    """Return nine trials of a search in `one`, and of one in `many` that is killed after each ask and each trial."""
    for name in ("one", "many"):
        (folder / name).mkdir()
    whole, resumed = list(play(StudyStore.open(folder / "one", config), 9)), list[Asked]()
    for target in range(1, 10):
        cut = StudyStore.open(folder / "many", config).ask([], target)
        resumed += play(StudyStore.open(folder / "many", config), target)
        assert resumed[-1] == cut
    return whole, resumed


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def sweep(*args: object) -> Outcome:
    """Run a command in this process: importing torch costs seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["sweep", *map(str, args)])
        patch.setattr("sweep.cli.app.leave_hanging_calls", lambda code: None)  # it would end this process
        patch.setattr(RayStart, "begin", lambda *_: None)  # inputs are checked here without a Ray in this process
        for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONWARNINGS"):
            patch.setenv(name, os.environ.get(name, ""))  # which main() sets for good
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as ended:
                code = int(ended.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder, with its content."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refused(here: Path, *args: object) -> str:
    """Return the error of a command, which must leave the folder as it was."""
    before = tree(here)
    outcome = sweep(*args)
    assert tree(here) == before
    assert outcome.out == ""
    return complaint(outcome)


def complaint(outcome: Outcome) -> str:
    """Return the only error of a command that ended with the exit code for bad input."""
    assert outcome.code == 2
    start, message = outcome.err.split("error: ")
    assert (start, "Traceback" in message) == ("", False)
    return message


def sweep_runner(config: Config, folder: Path) -> SweepRunner:
    """Return the runner of a sweep that no other process holds."""
    return SweepRunner(config, folder, Silent(), lambda: None, StopRequest(), RayStart())
