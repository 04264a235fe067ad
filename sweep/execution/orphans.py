"""Orphans: processes and Ray's scratch folder that a killed run of a sweep leaves on its machine.

Ray's processes usually end with the driver that started them; a killed raylet leaves its workers running for a while.
A process is identified by pid and start time, because pids are used again.
"""

import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from data.atomic import write_file

FILE = "processes.json"
PREFIX = "sweep-ray-"  # of scratch folders
EVERY = 1.0  # seconds between two looks
Processes = dict[int, float]  # pid → start time


@contextlib.contextmanager
def recorded(folder: Path | None, scratch: Path) -> Iterator[None]:
    """Record in the sweep's folder what this process starts, so that the next run can end it after a kill.

    Args:
        folder: of the sweep; None records nothing.
        scratch: Ray's folder, which is removed at the end.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(folder, scratch, ended), daemon=True, name="orphans")
    if folder is not None:
        _write(folder, scratch, {})
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if folder is not None:
            thread.join()
            end_orphans(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def _follow(folder: Path, scratch: Path, ended: threading.Event) -> None:
    """Keep the record up to date; a process whose parent has died is no child any more, but stays in it."""
    recorded: Processes = {}
    while not ended.wait(EVERY):
        alive = {pid: started for pid, started in recorded.items() if _process(pid, started)}
        current = alive | child_processes()
        if current != recorded:
            recorded = current
            with contextlib.suppress(OSError):  # a full disk: the previous record remains
                _write(folder, scratch, recorded)


def _write(folder: Path, scratch: Path, processes: Processes) -> None:
    content = {"host": socket.gethostname(), "boot": psutil.boot_time(), "scratch": str(scratch)}
    write_file(folder / FILE, json.dumps({**content, "processes": processes}))


def child_processes() -> Processes:
    """Return all processes below this one."""
    children = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            children[process.pid] = process.create_time()
    return children


def kill(processes: Processes) -> list[int]:
    """Kill the processes that still run, and return their pids."""
    alive = [process for pid, started in processes.items() if (process := _process(pid, started))]
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    return [process.pid for process in alive]


def end_orphans(folder: Path) -> list[int]:
    """Kill what a run of this sweep has left on this machine, and remove its scratch folder.

    Only the holder of the sweep's lease may call this.

    Returns:
        The pids of the processes that were killed.
    """
    path = folder / FILE
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # no valid record
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["host"] != socket.gethostname() or abs(record["boot"] - psutil.boot_time()) > 60:
            return []  # of another machine, or from before its last start: the processes are not here
        killed = kill({int(pid): started for pid, started in record["processes"].items()})
        scratch = Path(record["scratch"])
        if scratch.name.startswith(PREFIX) and scratch.parent == scratch_root():
            shutil.rmtree(scratch, ignore_errors=True)
        path.unlink(missing_ok=True)
        return killed
    return []


def scratch_root() -> Path:
    """Return the parent of scratch folders: the path of a socket inside must not exceed 107 characters."""
    default = Path(tempfile.gettempdir())
    return default if len(str(default)) < 24 else Path("/tmp")


def is_running_as(pid: int, started: float, names: Sequence[str]) -> bool:
    """Return whether a process still runs under one of these names."""
    process = _process(pid, started)
    with contextlib.suppress(psutil.Error):
        return process is not None and process.name() in names
    return False


def _process(pid: int, started: float) -> psutil.Process | None:
    """Return the process unless it has ended; another process may have got its pid."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
