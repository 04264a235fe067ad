"""The processes of a sweep: whom a kill hits, and whom it leaves behind."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

TITLES = {  # of processes of Ray; the driver, MLflow's server and the whole cluster are known otherwise
    "worker": ("ray::RayTrainWorker",),
    "group": ("ray::WorkerGroup", "ray::ResourceTrainable"),
    "mailbox": ("ray::Mailbox",),
    "controller": ("ray::TrainController",),
}
PROGRAMS = {"raylet": "raylet", "gcs": "gcs_server"}


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it that can be seen now."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def title(process: psutil.Process) -> str:
    """How a process calls itself; empty if it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def find(kind: str, driver: int) -> list[psutil.Process]:
    """The processes of a kind below a driver."""
    members = tree(driver)
    if kind in PROGRAMS:
        return [member for member in members if Path(title(member).partition(" ")[0]).name == PROGRAMS[kind]]
    return [member for member in members if title(member).startswith(TITLES[kind])]


def kill(processes: Iterable[psutil.Process], number: int) -> None:
    """Send a signal to all of them at once."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def belonging(*places: Path) -> list[psutil.Process]:
    """The processes that have to do with one of the folders: by name, environment, working folder or open files."""
    names = [str(place) for place in places]
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _names(process, names)]


def _names(process: psutil.Process, names: list[str]) -> bool:
    for look in (_words, _environment, _cwd, _files):
        with contextlib.suppress(psutil.Error, OSError):
            told = look(process)
            if any(name in told for name in names):
                return process.status() != psutil.STATUS_ZOMBIE
    return False


def _words(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def _environment(process: psutil.Process) -> str:
    return " ".join(process.environ().values())


def _cwd(process: psutil.Process) -> str:
    return str(process.cwd())


def _files(process: psutil.Process) -> str:
    return " ".join(file.path for file in process.open_files())
