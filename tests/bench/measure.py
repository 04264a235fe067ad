"""What the benchmarks share: rows of the table, CPU time of a process with its children, rounds in turns."""

import contextlib
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


def cpu_times() -> dict[int, float]:
    """Return the CPU seconds of this process, of each one below it, and (key 0) of its children that have ended."""
    own = psutil.Process()
    found = {0: own.cpu_times().children_user + own.cpu_times().children_system}
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def spent(before: dict[int, float], after: dict[int, float]) -> float:
    """CPU time between two readings."""
    return sum(max(0.0, now - before.get(process, 0.0)) for process, now in after.items())


@dataclass
class Cost:
    """What a round of something took."""

    cpu: float  # s
    wall: float  # s


def measured(work: Callable[[], object]) -> Cost:
    """What something takes, with all processes below this one."""
    before, started = cpu_times(), time.monotonic()
    work()
    return Cost(spent(before, cpu_times()), time.monotonic() - started)


def in_turns(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Cost]]:
    """Run all variants once a round, so that a change of the machine's load hits all of them.

    A first round is not counted: it opens files and starts processes. Each round begins with another variant: the one
    before leaves the caches cold.
    """
    taken: dict[str, list[Cost]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        shift = number % len(variants)
        for name, work in [*list(variants.items())[shift:], *list(variants.items())[:shift]]:
            cost = measured(work)
            if number:
                taken[name].append(cost)
    return taken


def ratios(slower: Sequence[Cost], faster: Sequence[Cost]) -> list[float]:
    """How many times the CPU time of `faster` the other takes, by round."""
    return [one.cpu / other.cpu for one, other in zip(slower, faster, strict=True)]
