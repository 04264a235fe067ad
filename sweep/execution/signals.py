"""How a command ends: its exit codes, an orderly end on signals (SIGTERM, SIGUSR1, Ctrl-C), and its last line."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import FrameType
from typing import Self

from sweep.execution import orphans

Handler = Callable[[int, FrameType | None], object] | int | None
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # batch systems and `ray job stop` send the first two
# The shell reads one line. It gets none if the process ends without writing it.
SCRIPT = 'trap "" HUP INT TERM USR1; read -r ended; [ -n "$ended" ] || printf "%s\\n" "$1" >&2'
END_SECONDS = 5.0  # until the shell has ended


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


@contextlib.contextmanager
def exit_line(line: str) -> Iterator[None]:
    """Write a line to stderr if the process is ended at once inside the block: by the kernel, or by Ray's core.

    Such a process can write nothing any more. A small shell waits for its end and writes the line for it.
    """
    try:
        command, pipe = ["/bin/sh", "-c", SCRIPT, "sh", line], subprocess.PIPE
        shell = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError:  # an image without a shell
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            shell.communicate(b"ended\n", timeout=END_SECONDS)
