"""An orderly end on SIGTERM, SIGUSR1 (batch systems, `ray job stop`) and Ctrl-C; a second Ctrl-C ends at once."""

import os
import signal
import threading
from types import FrameType

from sweep.execution import orphans as leftovers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
UNFINISHED = 75  # exit code: the same command goes on


class Stop:
    """Knows whether the sweep was asked to end.

    Until `patient` is set, there is nothing to be ended in an orderly way: a signal raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.patient = False

    def install(self) -> None:
        """Take the signals over; again after `ray.init`, which puts handlers of its own in place."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self.asked.is_set()
        self.asked.set()
        if not self.patient:
            raise KeyboardInterrupt
        if not first and number == signal.SIGINT:
            leftovers.end(leftovers.children())
            os._exit(UNFINISHED)
