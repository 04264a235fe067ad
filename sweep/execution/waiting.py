"""Wait for something outside this process, within a limit.

A call into Ray's core cannot be interrupted, and Python handles no signal meanwhile. So such a call runs in a thread,
and the thread that waits for it looks up every moment. docs/limits.md lists all limits.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from data.errors import reason

T = TypeVar("T")

MOMENT = 0.2  # seconds between two looks, and so until a signal is handled
Warn = Callable[[str], object]


class LimitExceededError(Exception):
    """What a call waits for did not come in time; its thread still waits."""


class Work(threading.Thread, Generic[T]):
    """Run a function in a daemon thread, which leaves the signals to the main thread."""

    def __init__(self, work: Callable[[], T], name: str, stay: threading.Event | None = None) -> None:
        super().__init__(daemon=True, name=name)
        self.work, self.stay, self.done = work, stay, threading.Event()
        self.value: T | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Keep what the function returns or raises."""
        try:
            self.value = self.work()
        except BaseException as error:  # `outcome` raises it in the thread that waits
            self.error = error
        self.done.set()
        if self.stay is not None and self.error is None:
            self.stay.wait()

    def within(self, seconds: float) -> T:
        """Return what the function returns, or raise what it raises.

        Args:
            seconds: limit from now on; the function continues after it.

        Raises:
            LimitExceededError: it takes longer.
        """
        moments = max(1, round(seconds / MOMENT))
        while not self.done.wait(MOMENT):
            moments -= 1
            if moments <= 0:
                raise LimitExceededError(f"no answer within {seconds:.0f} s")
        return self.outcome()

    def outcome(self) -> T:
        """Return or raise what the function did; it has ended."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # of type T once the function has returned


def within(seconds: float, work: Callable[[], T], name: str, stay: threading.Event | None = None) -> T:
    """Return what a function returns, or raise what it raises.

    Args:
        seconds: limit of the call.
        work: the function; it continues in its thread after the limit.
        name: of the thread.
        stay: lets the thread live until it is set: Linux kills what a thread has started with it, if asked to.

    Raises:
        LimitExceededError: it takes longer.
    """
    return Work(work, name, stay).within(seconds)


def leave_hanging_calls(code: object) -> None:
    """End the process with its exit code if a call in a thread still hangs, as calls to a lost cluster do.

    At a normal end, Python and Ray's core would wait for it; after a minute the core ends the process with code 1.
    """
    if any(isinstance(thread, Work) for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


@contextlib.contextmanager
def cleaning_up(what: str, warn: Warn) -> Iterator[None]:
    """Do a step of a clean-up; show its error, which must not replace how the command ended."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):
            warn(f"could not {what} ({reason(error)})")
