"""Save checkpoints in processes that are killed at their N-th operation on files, and report what each leaves.

The product has no hook for it: the operations are those of `os` and of the files that it opens.
"""

import io
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from model.checkpoints import checkpoint, checksum
from model.checkpoints.fencing import TrialLock

CALLS = ("replace", "rename", "link", "unlink", "fsync", "open", "close")  # of os


def state_of(number: int) -> dict[str, Any]:
    """Return the state after a number of saves; every part of it depends on the number."""
    return {
        "tensors": {"weight": torch.full((300, 7), float(number))},
        "progress": {"step": number},
        "parents": [],
        "files": {},
        "meaning": {"adapter": str(number)},
    }


def number_of(state: dict[str, Any]) -> int:
    """Return the number of a state; parts of different saves are an error."""
    number: int = state["progress"]["step"]
    assert torch.equal(state["tensors"]["weight"], torch.full((300, 7), float(number)))
    assert state["meaning"] == {"adapter": str(number)}
    return number


class Killer:
    """Ends the process before its N-th operation; a write is cut in half."""

    def __init__(self, at: int) -> None:
        self.left = at
        for name in CALLS:
            setattr(os, name, self.watched(getattr(os, name)))
        io.open = self.watched(io.open)
        checksum._HashingWriter.write = self.cut(checksum._HashingWriter.write)  # type: ignore[method-assign]

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **options: Any) -> Any:
            self.tick()
            return call(*args, **options)

        return watching

    def cut(self, call: Callable[..., int]) -> Callable[..., int]:
        def writing(stream: Any, content: Any) -> int:
            if self.left == 1:
                call(stream, bytes(content)[: len(bytes(content)) // 2])
                stream.file.flush()
            self.tick()
            return call(stream, content)

        return writing

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, number: int, at: int, hard_links: bool) -> bool:
    """Save in a process that is killed at its N-th operation; False when it had fewer."""
    child = os.fork()
    if child == 0:
        if not hard_links:
            os.link = refuse  # type: ignore[assignment]
        Killer(at)
        checkpoint.save(folder / checkpoint.FILE, state_of(number))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def refuse(*_: Any, **__: Any) -> None:
    """As a file system without hard links does."""
    raise OSError(95, "Operation not supported")


def kill_at_every_operation(folder: Path, cases: Iterable[tuple[bool, int]]) -> list[dict[str, Any]]:
    """Return what a kill at each operation leaves of a save, and what one more save does.

    Args:
        folder: to work in.
        cases: whether there are hard links, and the number of saves before.
    """
    rows = []
    for hard_links, former in cases:
        at, more = 1, True
        while more:
            trial = folder / f"{hard_links}-{former}-{at}"
            for number in range(1, former + 1):
                checkpoint.save(trial / checkpoint.FILE, state_of(number))
            trial.mkdir(parents=True, exist_ok=True)
            more = killed(trial, former + 1, at, hard_links)
            TrialLock.claim(trial)
            newest, notes = checkpoint.newest(trial)
            name, state = newest or (None, {})
            row = {"links": hard_links, "former": former, "at": at, "killed": more, "notes": notes}
            row |= {"name": name, "number": number_of(state) if name else 0}
            row["files"] = sorted(path.name for path in trial.iterdir())
            checkpoint.save(trial / checkpoint.FILE, state_of(9))
            row["next"] = number_of(checkpoint.load(trial / checkpoint.FILE))
            row["previous"] = (trial / checkpoint.PREVIOUS).exists()
            rows.append(row)
            shutil.rmtree(trial)
            at += 1
    return rows
