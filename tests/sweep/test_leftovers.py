"""What a killed attempt leaves behind is ended, and nothing else."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sweep.execution import orphans as leftovers
from sweep.execution.orphans import FILE, PREFIX, end_leftovers, recorded


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


def test_a_process_that_was_written_down_is_ended(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    write(tmp_path, sleeper.pid)
    assert end_leftovers(tmp_path) == [sleeper.pid]
    sleeper.wait(5)
    assert end_leftovers(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"shift": 5.0}, {"host": "elsewhere"}, {"boot": 1.0}])
def test_a_process_of_somebody_else_is_left_alone(
    change: dict[str, object], tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    write(tmp_path, sleeper.pid, **change)  # type: ignore[arg-type]
    assert end_leftovers(tmp_path) == []
    assert sleeper.poll() is None


def test_a_damaged_record_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"host": ')
    assert end_leftovers(tmp_path) == []


def test_only_folders_of_ray_s_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "temporary", lambda: tmp_path)
    (own := tmp_path / f"{PREFIX}1").mkdir()
    (other := tmp_path / "precious").mkdir()
    (elsewhere := tmp_path / "deep" / f"{PREFIX}2").mkdir(parents=True)
    (folder := tmp_path / "sweep").mkdir()
    process = psutil.Process().pid
    for place in (own, other, elsewhere):
        write(folder, process, shift=100.0, scratch=str(place))
        end_leftovers(folder)
    assert [place.exists() for place in (own, other, elsewhere)] == [False, True, True]


def test_what_runs_below_is_written_down_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a process whose parent has died meanwhile: it is nobody's child any more."""
    monkeypatch.setattr(leftovers, "EVERY", 0.02)
    (scratch := tmp_path / f"{PREFIX}1").mkdir()
    sleep = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"
    with recorded(tmp_path, scratch):
        parent = subprocess.Popen([sys.executable, "-c", code])
        children = until(lambda: psutil.Process(parent.pid).children())
        until(lambda: str(children[0].pid) in json.loads((tmp_path / FILE).read_text())["processes"])
        parent.kill()
        parent.wait()
        assert children[0].is_running()
        time.sleep(0.1)
    assert not children[0].is_running()
    assert list(tmp_path.iterdir()) == []


def until(condition: object) -> list[psutil.Process]:
    end = time.monotonic() + 10
    while not (found := condition()):  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)
    return found  # type: ignore[no-any-return]
