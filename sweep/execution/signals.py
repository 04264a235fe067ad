"""Exit codes, and an orderly end on SIGTERM, SIGUSR1 (batch systems, `ray job stop`) and Ctrl-C."""

import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Self

from sweep.execution import orphans

Handler = Callable[[int, FrameType | None], object] | int | None
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class ExitCode(IntEnum):
    """How a command ended."""

    DONE = 0
    INFRASTRUCTURE = 1  # Ray, a disk, a database, another process: rerun the same command once it is fixed
    BAD_INPUT = 2  # data or settings
    UNFINISHED = 75  # rerun the same command to resume


class StopRequest:
    """Records whether the sweep was asked to stop; the signals are handled while the context is entered.

    As long as `graceful` is not set, no trial runs that could write a checkpoint, so a signal raises
    KeyboardInterrupt. Outside the main thread Python delivers no signals, and none are handled.

    Args:
        exits: whether a second Ctrl-C ends the process at once, as the command line does, instead of raising
            KeyboardInterrupt.
    """

    def __init__(self, exits: bool = False) -> None:
        self.requested = threading.Event()
        self.graceful = False
        self.exits = exits
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Handle the signals; call it again after `ray.init`, which installs its own handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self.requested.is_set()
        self.requested.set()
        if not self.graceful:
            raise KeyboardInterrupt
        if not first and number == signal.SIGINT:
            if not self.exits:
                raise KeyboardInterrupt
            orphans.kill(orphans.cluster_processes())
            os._exit(ExitCode.UNFINISHED)
