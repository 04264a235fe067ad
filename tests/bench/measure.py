"""What the benchmarks share: rows of the table, CPU time of a process with its children, rounds in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil


@dataclass
class Row:
    """A comparison: one ratio a round."""

    name: str
    against: str  # what the ratio is relative to
    runs: list[float] = field(default_factory=list)  # none: it could not be run
    goal: float | None = None
    most: bool = False  # whether the goal is an upper bound
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The median of the rounds."""
        return statistics.median(self.runs) if self.runs else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a run."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio <= self.goal if self.most else self.ratio >= self.goal


def cpu_seconds() -> float:
    """CPU time so far of this process, its children, and those of them that have ended."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass
class Cost:
    """What a round of something took."""

    cpu: float  # s
    wall: float  # s


def in_turns(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Cost]]:
    """Run all variants once a round, so that a change of the machine's load hits all of them.

    A first round is not counted: it opens files and starts processes.
    """
    taken: dict[str, list[Cost]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, work in variants.items():
            cpu, wall = cpu_seconds(), time.monotonic()
            work()
            cost = Cost(cpu_seconds() - cpu, time.monotonic() - wall)
            if number:
                taken[name].append(cost)
    return taken


def ratios(slower: Sequence[Cost], faster: Sequence[Cost]) -> list[float]:
    """How many times the CPU time of `faster` the other takes, by round."""
    return [one.cpu / other.cpu for one, other in zip(slower, faster, strict=True)]
