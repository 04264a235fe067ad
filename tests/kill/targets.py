"""The processes of a sweep: which a kill hits, and which it leaves behind."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

TITLES = {  # of Ray's processes; the driver, the MLflow server and the whole cluster are found otherwise
    "worker": ("ray::RayTrainWorker", "ray::TrialWorker"),
    "group": ("ray::WorkerGroup", "ray::ResourceTrainable"),
    "mailbox": ("ray::Mailbox",),
    "controller": ("ray::TrainController",),
}
PROGRAMS = {"raylet": "raylet", "gcs": "gcs_server"}


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def title(process: psutil.Process) -> str:
    """Return the command line of a process; "" if it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def name(process: psutil.Process) -> str:
    """Return the name of a process, which a raylet that is started under another one sets; "" if it is gone."""
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""


def find(kind: str, driver: int) -> list[psutil.Process]:
    """Return the processes of a kind below a driver."""
    members = tree(driver)
    if kind in PROGRAMS:
        return [member for member in members if name(member) == PROGRAMS[kind]]
    return [member for member in members if title(member).startswith(TITLES[kind])]


def kill(processes: Iterable[psutil.Process], number: int) -> None:
    """Send a signal to all processes."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def belonging(*folders: Path) -> list[psutil.Process]:
    """Return the processes that use one of the folders: by name, environment, working folder or open files."""
    names = [str(folder) for folder in folders]
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _names(process, names)]


def _names(process: psutil.Process, names: list[str]) -> bool:
    for look in (
        lambda: process.cmdline(),
        lambda: process.environ().values(),
        lambda: [process.cwd()],
        lambda: [file.path for file in process.open_files()],
    ):
        with contextlib.suppress(psutil.Error, OSError):
            text = " ".join(look())
            if any(name in text for name in names):
                return process.status() != psutil.STATUS_ZOMBIE
    return False
