"""The optimizer steps of trials, as `faults/sitecustomize.py` records them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

FILE = "steps.jsonl"


class Step(NamedTuple):
    """An optimizer step."""

    time: float
    pid: int  # of the worker that leads
    trial: int
    step: int


class Progress:
    """Recovery of a sweep from a kill: new steps of processes that the kill does not affect."""

    def __init__(self) -> None:
        self.made: dict[int, list[Step]] = {}  # by trial, since the kill

    def add(self, steps: Iterable[Step]) -> None:
        """Add new steps."""
        for step in steps:
            self.made.setdefault(step.trial, []).append(step)

    def resumed(self, trial: int) -> float | None:
        """Return when the living worker of a trial made its first new step; None if it made none."""
        made = self.made.get(trial)
        if not made or not lives(made[-1].pid):
            return None
        return next(step.time for step in made if step.pid == made[-1].pid)

    def first(self) -> float | None:
        """Return the same for any trial."""
        return min((time for trial in self.made if (time := self.resumed(trial)) is not None), default=None)


def lives(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Steps:
    """Follows the steps of a sweep; a step is new if no run of the sweep has made it before."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.offset = 0
        self.highest: dict[int, int] = {}
        self.newest = 0.0  # when the last new step was made

    def look(self) -> list[Step]:
        """Return the new steps since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        self.offset += len(content)
        found = []
        for step in parsed(content):
            if step.step > self.highest.get(step.trial, 0):
                self.highest[step.trial] = step.step
                self.newest = step.time
                found.append(step)
        return found


def parsed(content: bytes) -> Iterator[Step]:
    """Yield all steps in the content of a file."""
    for line in content.splitlines():
        yield Step(**json.loads(line))


def redone(content: bytes, kills: list[float]) -> list[dict[int, int]]:
    """Return the repeated steps, by trial, after each of the kills.

    Args:
        content: of the file.
        kills: their times, in order.

    Returns:
        One entry a kill, and before them one for what was redone before the first, which should be empty.
    """
    highest: dict[int, int] = {}
    counts: list[dict[int, int]] = [{} for _ in range(len(kills) + 1)]
    for step in parsed(content):
        if step.step > highest.get(step.trial, 0):
            highest[step.trial] = step.step
            continue
        after = sum(kill <= step.time for kill in kills)
        counts[after][step.trial] = counts[after].get(step.trial, 0) + 1
    return counts
