"""The metrics log: each (metric, step) once, whatever happened to its writer."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from model.training.metrics_log import FILE, MetricsLog, MetricsReader, Point


def line(step: Any, loss: Any = 0.5, seconds: Any = 1000.0, **more: Any) -> str:
    return json.dumps({"time": seconds, "step": step, "values": {"loss": loss}, **more}) + "\n"


def write(folder: Path, *parts: str) -> Path:
    with (folder / FILE).open("a") as file:
        file.write("".join(parts))
    return folder


def steps(points: list[Point]) -> list[int]:
    return [point.step for point in points]


def test_read_returns_each_point_once(tmp_path: Path) -> None:
    """Half a line waits for its rest; lines that no server accepts are skipped."""
    log, half = MetricsReader(tmp_path), line(20)[:25]
    assert log.read() == []
    write(tmp_path, line(10, 0.25, 1000.1239), half)
    assert log.read() == [Point("loss", 10, 1000123, 0.25)]
    write(tmp_path, "\n", line(20), "\x00\x00\n", "[1]\n", "{}\n", line(30)[:9])
    assert steps(log.read()) == [20]
    write(tmp_path, line(30)[9:])
    assert steps(log.read()) == [30]
    assert log.last_steps() == {"loss": 30}
    write(tmp_path, line(40, "text"), line(40, None), line("40"), line(50, seconds=None), line(60, float("inf")))
    assert steps(log.read()) == [60]


def test_read_takes_the_first_value_of_a_step(tmp_path: Path) -> None:
    write(tmp_path, line(10, 0.1), line(20, 0.2), line(10, 0.11, attempt=2), line(20, 0.21, attempt=2), line(30, 0.3))
    assert [point.value for point in MetricsReader(tmp_path).read()] == [0.1, 0.2, 0.3]


def test_late_point_fills_its_gap_in_every_process(tmp_path: Path) -> None:
    log = MetricsReader(write(tmp_path, line(16), line(48)))
    assert steps(log.read()) == [16, 48]
    write(tmp_path, line(32), line(48))
    assert steps(log.read()) == [32]
    again = MetricsReader(tmp_path)
    assert again.skip(len(line(16)) * 2)
    assert steps(again.read()) == [32]


def test_skip_needs_a_file_of_that_size(tmp_path: Path) -> None:
    write(tmp_path, line(10), line(20))
    size = (tmp_path / FILE).stat().st_size
    assert not MetricsReader(tmp_path).skip(size + 1), "the file was restored from an older copy"
    assert MetricsReader(tmp_path / "nothing").skip(0)
    assert steps(MetricsReader(tmp_path, {"loss": {20}}).read()) == [10]


def test_attempts_and_times(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    assert (log.last_attempt(), log.time_range()) == (None, None)
    write(tmp_path, line(10, seconds=1.0))
    assert log.last_attempt() is None
    lines = ((20, 2.0, 1), (30, 5.0, 3), (40, 4.0, 2))
    write(tmp_path, *(line(step, seconds=seconds, attempt=attempt) for step, seconds, attempt in lines))
    assert (log.last_attempt(), log.time_range()) == (3, (1000, 5000))


def test_torn_line_stays_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process was killed while it wrote; where the disk is full, the part of the line is removed."""
    log, write_all, room = MetricsLog(tmp_path), os.write, [7]
    log.append({"a": 1.0}, time=1, step=1, attempt=1)
    with log.path.open("ab") as file:
        file.write(b'{"step": 2, "val')
    log.append({}, time=1, step=3, attempt=1, epoch=1)
    assert log.path.read_bytes().count(b"\n") == 3
    assert [(line.step, line.epoch) for line in log.lines()] == [(1, None), (3, 1)]
    before = log.path.read_bytes()

    def write_little(descriptor: int, content: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_all(descriptor, content[: room.pop()])

    monkeypatch.setattr(os, "write", write_little)
    with pytest.raises(OSError, match="No space"):
        log.append({}, time=1, step=4, attempt=1)
    assert log.path.read_bytes() == before
