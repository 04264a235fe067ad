"""Tasks: what worker groups do besides trials, such as dry runs and files of the feature cache.

    prepare (a thread of the driver) ── run ──► TaskQueue ◄── take, ended ── StudySearcher (Tune's thread)

The queue also says which trials may start: before the preparation is ready for a trial, the trial waits.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from data.errors import UserError
from sweep.config.space import Values
from sweep.execution.job import FitReport, Task
from sweep.execution.waiting import MOMENT

Calls = Sequence[Callable[[], str]]


class Offer(NamedTuple):
    """A task that no worker group has taken yet."""

    place: int  # among the tasks that were added together
    calls: Callable[[], Calls]  # made when a worker group takes the task
    restarts: int
    temporary: bool


class EndedTask(NamedTuple):
    """A task that has ended."""

    place: int  # see `Offer`
    results: list[str] | None  # None: the process that did it has died


class QueueClosedError(Exception):
    """The sweep ends, so nothing does the tasks that are left."""


class TaskQueue:
    """Tasks for worker groups, and the trials that may start.

    Attributes:
        waits: returns whether a trial with some values must not start yet; None before any trial may start.
        version: increases when there may be something to do for a worker group on standby.
        announce: tells all worker groups the version.
    """

    def __init__(self) -> None:
        self.waits: Callable[[Values], bool] | None = None
        self.version = 0
        self.announce: Callable[[int], object] = lambda version: None
        self._offers: deque[Offer] = deque()
        self._running: dict[str, int] = {}  # Tune's trial id → place
        self._at_once = 0
        self._ended: deque[EndedTask] = deque()
        self._failure = ""
        self._closed = False
        self._changed = threading.Condition()

    def run(
        self,
        tasks: Sequence[Callable[[], Calls]],
        *,
        at_once: int,
        restarts: int = 0,
        temporary: bool = False,
    ) -> Iterator[EndedTask]:
        """Let worker groups do some tasks, and yield them in the order in which they end.

        Args:
            tasks: each returns functions; the workers of a group share them.
            at_once: the largest number of worker groups that do tasks at the same time.
            restarts: how often new workers repeat a task after they have died.
            temporary: whether no trial needs the models that the tasks load.

        Raises:
            UserError: a function has raised an exception.
            QueueClosedError: the sweep ends.
        """
        with self._changed:
            self._at_once = at_once
            self._offers.extend(Offer(place, calls, restarts, temporary) for place, calls in enumerate(tasks))
        self.announce_change()
        for _ in tasks:
            with self._changed:
                while not (self._ended or self._failure or self._closed):
                    self._changed.wait(MOMENT)
                if self._failure or self._closed:
                    self._offers.clear()
                    raise UserError(self._failure) if self._failure else QueueClosedError
                ended = self._ended.popleft()
            yield ended

    def take(self, name: str) -> Task | None:
        """Return the next task, if there is one.

        Args:
            name: Tune's id of it.
        """
        import ray

        with self._changed:
            if not self._offers or len(self._running) >= self._at_once:
                return None
            offer = self._offers.popleft()
            self._running[name] = offer.place
        return Task(ray.put(offer.calls()), offer.restarts, offer.temporary)

    def ended(self, name: str, result: FitReport, error: bool) -> bool:
        """Record how a task ended, and return whether the name is that of a task."""
        with self._changed:
            if (place := self._running.pop(name, None)) is None:
                return False
            if result.get("finished"):
                self._ended.append(EndedTask(place, result["results"]))
            elif error or result.get("reason") == "workers lost":
                self._ended.append(EndedTask(place, None))
            elif "failed" in result:
                self._failure = result["failed"]
            self._changed.notify_all()
        self.announce_change()  # another task may start now
        return True

    def announce_change(self) -> None:
        """Let worker groups on standby ask again."""
        with self._changed:
            self.version += 1
            self.announce(self.version)

    def close(self) -> None:
        """Do no more tasks; `run` raises a QueueClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
