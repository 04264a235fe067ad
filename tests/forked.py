"""Processes forked from this one, which has imported torch already: that takes seconds in a process of its own."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


class Forked:
    """A function that runs in a process forked from this one.

    Args:
        work: the function.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.answer, other = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=self._run, args=(work, other))
        self.process.start()
        other.close()

    @staticmethod
    def _run(work: Callable[[], Any], answer: Connection) -> None:
        answer.send(work())

    def result(self) -> Any:
        """Return what the function returned; raises EOFError if its process ended before."""
        try:
            return self.answer.recv()
        finally:
            self.process.join()
