"""What a killed attempt leaves on its machine: processes, known by pid and start time, and Ray's folder in /tmp.

As a rule, Ray's processes end with the driver that started them; a raylet that was killed leaves its workers for a
while.
"""

import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from data.atomic import write_file

FILE = "processes.json"
PREFIX = "sweep-ray-"  # of Ray's folders
EVERY = 1.0  # seconds between two looks
Known = dict[int, float]  # pid → start time


@contextlib.contextmanager
def recorded(folder: Path | None, scratch: Path) -> Iterator[None]:
    """Write down, in the sweep's folder, what this process starts, so that the next attempt can end it.

    Args:
        folder: of the sweep; None: nothing is written.
        scratch: a folder of Ray's, which is removed at the end.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(folder, scratch, ended), daemon=True, name="leftovers")
    if folder is not None:
        _write(folder, scratch, {})
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if folder is not None:
            thread.join()
            end_leftovers(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def _follow(folder: Path, scratch: Path, ended: threading.Event) -> None:
    known: Known = {}
    while not ended.wait(EVERY):
        alive = {pid: started for pid, started in known.items() if _process(pid, started)}
        now = alive | children()
        if now != known:
            known = now
            with contextlib.suppress(OSError):  # a full disk: what was known before stands there
                _write(folder, scratch, known)


def children() -> Known:
    """The processes below this one."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[process.pid] = process.create_time()
    return found


def end(processes: Known) -> list[int]:
    """Kill processes that are still the ones that were known; their pids."""
    alive = [process for pid, started in processes.items() if (process := _process(pid, started))]
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    return [process.pid for process in alive]


def end_leftovers(folder: Path) -> list[int]:
    """End what an attempt at this sweep has left on this machine.

    Only the holder of the sweep's lease may call this.

    Returns:
        The pids of the processes that were ended.
    """
    path = folder / FILE
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # or no such record
        left = json.loads(path.read_text(encoding="utf-8"))
        if left["host"] != socket.gethostname() or abs(left["boot"] - psutil.boot_time()) > 60:
            return []  # of another machine, or from before its last start: its processes are not here
        ended = end({int(pid): started for pid, started in left["processes"].items()})
        scratch = Path(left["scratch"])
        if scratch.name.startswith(PREFIX) and scratch.parent == temporary():
            shutil.rmtree(scratch, ignore_errors=True)
        path.unlink(missing_ok=True)
        return ended
    return []


def temporary() -> Path:
    """Where Ray's folder goes: names of sockets within must not be longer than 107 characters."""
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) < 24 else Path("/tmp")


def is_called(known: tuple[int, float], names: Sequence[str]) -> bool:
    """Whether a process, by pid and start time, still runs and has one of these names."""
    process = _process(*known)
    with contextlib.suppress(psutil.Error):
        return process is not None and process.name() in names
    return False


def _process(pid: int, started: float) -> psutil.Process | None:
    """The process, unless it has ended; another one that has got its number is not it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _write(folder: Path, scratch: Path, processes: Known) -> None:
    content: dict[str, Any] = {"host": socket.gethostname(), "boot": psutil.boot_time(), "scratch": str(scratch)}
    write_file(folder / FILE, json.dumps(content | {"processes": processes}))
