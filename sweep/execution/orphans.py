"""Orphans: processes and Ray's scratch folder that a killed run of a sweep leaves on its machine.

Ray's processes usually end with the driver that started them; a killed raylet leaves its workers running for a while.
Only the processes of one local cluster count, by the variable `MARK` of their environment: other children of the
driver, as a notebook has them, and other sweeps of the same user are left alone. A process is identified by pid and
start time, because pids are used again.
"""

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from data.atomic import write_file
from sweep.execution.waiting import Warn, cleaning_up

FILE = "processes.json"
PREFIX = "sweep-ray-"  # of scratch folders
MARK = "SWEEP_RAY_SCRATCH"  # variable in the environment of all processes of a local cluster: its scratch folder
EVERY = 1.0  # seconds between two looks
JOIN_SECONDS = 10.0  # for the last look, which may write to a disk that is away
KILL_SECONDS = 10.0  # until a killed process has ended; one that waits for a disk ends later
Processes = dict[int, float]  # pid → start time


@contextlib.contextmanager
def killed_at_end(scratch: Path, warn: Warn = lambda line: None) -> Iterator[None]:
    """Kill the processes of a local cluster at the end of the block, and remove its scratch folder.

    Args:
        scratch: of the cluster.
        warn: shows a line to the user.
    """
    try:
        yield
    finally:
        with cleaning_up("end the processes of the local Ray", warn):
            kill(cluster_processes(scratch))
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def recorded(folder: Path, scratch: Path, warn: Warn = lambda line: None) -> Iterator[None]:
    """Record in the sweep's folder what this process starts, so that the next run can end it after a kill.

    Args:
        folder: of the sweep.
        scratch: Ray's folder, which is removed at the end.
        warn: shows a line to the user.
    """
    ended = threading.Event()
    _write(folder, scratch, {})
    thread = threading.Thread(target=_follow, args=(folder, scratch, ended), daemon=True, name="orphans")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        with cleaning_up("end the recorded processes of Ray", warn):
            thread.join(JOIN_SECONDS)
            end_orphans(folder)


def _follow(folder: Path, scratch: Path, ended: threading.Event) -> None:
    """Keep the record up to date; a process whose parent has died is no child any more, but stays in it."""
    recorded: Processes = {}
    while not ended.wait(EVERY):
        alive = {pid: started for pid, started in recorded.items() if _process(pid, started)}
        current = alive | cluster_processes(scratch)
        if current != recorded:
            recorded = current
            with contextlib.suppress(OSError):  # a full disk: the previous record remains
                _write(folder, scratch, recorded)


def _write(folder: Path, scratch: Path, processes: Processes) -> None:
    content = {"host": socket.gethostname(), "boot": psutil.boot_time(), "scratch": str(scratch)}
    write_file(folder / FILE, json.dumps({**content, "processes": processes}))


def cluster_processes(scratch: Path | None = None) -> Processes:
    """Return the processes below this one that belong to a local cluster.

    Ray's agents overwrite their environment with their title, so the children of a process that belongs to the cluster
    belong to it too.

    Args:
        scratch: of the cluster; None: of any cluster that this process has started.
    """
    processes: Processes = {}
    for process in psutil.Process().children(recursive=True):  # parents come before their children
        with contextlib.suppress(psutil.Error):
            if process.ppid() in processes or _is_marked(process, scratch):
                processes[process.pid] = process.create_time()
    return processes


def _is_marked(process: psutil.Process, scratch: Path | None) -> bool:
    mark = process.environ().get(MARK)
    return mark is not None and scratch in (None, Path(mark))


def _all_marked(scratch: Path) -> Processes:
    """Return all processes of a cluster that this user may look at, also those that no driver has recorded."""
    processes: Processes = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and _is_marked(process, scratch):
                processes[process.pid] = process.create_time()
    return processes


def kill(processes: Processes) -> list[int]:
    """Kill the processes that still run, and return their pids."""
    alive = [process for pid, started in processes.items() if (process := _process(pid, started))]
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=KILL_SECONDS)
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
        scratch = Path(record["scratch"])
        killed = kill(_all_marked(scratch) | {int(pid): started for pid, started in record["processes"].items()})
        if scratch.name.startswith(PREFIX) and scratch.parent == scratch_root():
            shutil.rmtree(scratch, ignore_errors=True)
        path.unlink(missing_ok=True)
        return killed
    return []


def scratch_root() -> Path:
    """Return the parent of scratch folders: the path of a socket inside must not exceed 107 characters."""
    default = Path(tempfile.gettempdir())
    return default if len(str(default)) < 22 else Path("/tmp")


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
