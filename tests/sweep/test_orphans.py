"""Orphans of a killed run are ended, and no other process."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sweep.execution import orphans
from sweep.execution.orphans import FILE, MARK, PREFIX, end_orphans, killed_at_end, recorded


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def write(folder: Path, pid: int, shift: float = 0.0, **more: object) -> None:
    known = {
        "host": socket.gethostname(),
        "boot": psutil.boot_time(),
        "scratch": "/nowhere",
        "processes": {pid: psutil.Process(pid).create_time() + shift},
    }
    (folder / FILE).write_text(json.dumps(known | more))


def test_recorded_process_is_ended(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    write(tmp_path, sleeper.pid)
    assert end_orphans(tmp_path) == [sleeper.pid]
    sleeper.wait(5)
    assert end_orphans(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"shift": 5.0}, {"host": "elsewhere"}, {"boot": 1.0}])
def test_process_of_another_owner_is_left_alone(
    change: dict[str, object], tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    write(tmp_path, sleeper.pid, **change)  # type: ignore[arg-type]
    assert end_orphans(tmp_path) == []
    assert sleeper.poll() is None


def test_damaged_record_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"host": ')
    assert end_orphans(tmp_path) == []


def test_only_scratch_folders_of_ray_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "scratch_root", lambda: tmp_path)
    (ours := tmp_path / f"{PREFIX}1").mkdir()
    (precious := tmp_path / "precious").mkdir()
    (elsewhere := tmp_path / "deep" / f"{PREFIX}2").mkdir(parents=True)
    (folder := tmp_path / "sweep").mkdir()
    process = psutil.Process().pid
    for place in (ours, precious, elsewhere):
        write(folder, process, shift=100.0, scratch=str(place))
        end_orphans(folder)
    assert [place.exists() for place in (ours, precious, elsewhere)] == [False, True, True]


def test_child_of_a_dead_child_is_recorded_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent has died, so it is no child of this process any more."""
    monkeypatch.setattr(orphans, "EVERY", 0.02)
    (scratch := tmp_path / f"{PREFIX}1").mkdir()
    sleep = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"
    with killed_at_end(scratch), recorded(tmp_path, scratch):
        parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, MARK: str(scratch)})
        children = until(lambda: psutil.Process(parent.pid).children())
        until(lambda: str(children[0].pid) in json.loads((tmp_path / FILE).read_text())["processes"])
        parent.kill()
        parent.wait()
        assert children[0].is_running()
        time.sleep(0.1)
    assert not children[0].is_running()
    assert list(tmp_path.iterdir()) == []


def test_process_that_no_driver_recorded_is_ended_by_its_mark(tmp_path: Path) -> None:
    """It started in the last second before the kill."""
    scratch = tmp_path / f"{PREFIX}1"
    ours, other = (subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: f"{scratch}{end}"}) for end in ("", "2"))
    try:
        write(tmp_path, psutil.Process().pid, shift=100.0, scratch=str(scratch))
        assert end_orphans(tmp_path) == [ours.pid]
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def until(condition: object) -> list[psutil.Process]:
    end = time.monotonic() + 10
    while not (found := condition()):  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)
    return found  # type: ignore[no-any-return]
