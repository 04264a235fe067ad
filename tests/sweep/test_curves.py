"""The write-ahead file: each (metric, step) once, whatever happened to its writer."""

import json
from pathlib import Path
from typing import Any

from model.training.metrics_log import FILE, MetricsLog, MetricsReader, Point


def line(step: Any, loss: Any = 0.5, seconds: Any = 1000.0, **more: Any) -> str:
    return json.dumps({"time": seconds, "step": step, "values": {"loss": loss}, **more}) + "\n"


def write(folder: Path, *parts: str) -> Path:
    with (folder / FILE).open("a") as file:
        file.write("".join(parts))
    return folder


def steps(points: list[Point]) -> list[int]:
    return [point.step for point in points]


def test_points_come_once_and_as_they_were_written(tmp_path: Path) -> None:
    curve = MetricsReader(tmp_path)
    assert curve.read() == []
    write(tmp_path, line(10, 0.25, 1000.1239))
    assert curve.read() == [Point("loss", 10, 1000123, 0.25)]
    assert curve.read() == []
    write(tmp_path, line(20), line(30))
    assert steps(curve.read()) == [20, 30]
    assert curve.last_steps() == {"loss": 30}


def test_half_a_line_waits_and_a_torn_one_is_passed_over(tmp_path: Path) -> None:
    curve, half = MetricsReader(tmp_path), line(20)[:25]
    write(tmp_path, line(10), half)
    assert steps(curve.read()) == [10]
    write(tmp_path, "\n", line(20), "\x00\x00\n", "[1]\n", "{}\n", line(30)[:9])
    assert steps(curve.read()) == [20]
    write(tmp_path, line(30)[9:])
    assert steps(curve.read()) == [30]


def test_of_a_step_that_was_made_again_the_first_counts(tmp_path: Path) -> None:
    write(tmp_path, line(10, 0.1), line(20, 0.2), line(10, 0.11, attempt=2), line(20, 0.21, attempt=2), line(30, 0.3))
    assert [point.value for point in MetricsReader(tmp_path).read()] == [0.1, 0.2, 0.3]


def test_a_point_that_comes_late_fills_its_hole(tmp_path: Path) -> None:
    curve = MetricsReader(write(tmp_path, line(16), line(48)))
    assert steps(curve.read()) == [16, 48]
    write(tmp_path, line(32), line(48))
    assert steps(curve.read()) == [32]
    again = MetricsReader(tmp_path)
    assert again.skip(len(line(16)) * 2)
    assert steps(again.read()) == [32], "another process knows as well"


def test_what_was_read_before_is_given_again_only_when_it_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, line(10), line(20))
    size = (tmp_path / FILE).stat().st_size
    assert not MetricsReader(tmp_path).skip(size + 1), "the file was put back from an older copy"
    assert MetricsReader(tmp_path / "nothing").skip(0)
    assert steps(MetricsReader(tmp_path, {"loss": {20}}).read()) == [10]


def test_what_no_server_takes_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, line(10, "text"), line(10, None), line("10"), line(20, seconds=None), line(30, float("inf")))
    assert steps(MetricsReader(tmp_path).read()) == [30]


def test_the_newest_attempt_counts_and_times_are_of_all(tmp_path: Path) -> None:
    assert (MetricsLog(tmp_path).last_attempt(), MetricsLog(tmp_path).time_range()) == (None, None)
    write(tmp_path, line(10, seconds=1.0))
    assert MetricsLog(tmp_path).last_attempt() is None
    write(
        tmp_path, line(20, seconds=2.0, attempt=1), line(30, seconds=5.0, attempt=3), line(40, seconds=4.0, attempt=2)
    )
    assert (MetricsLog(tmp_path).last_attempt(), MetricsLog(tmp_path).time_range()) == (3, (1000, 5000))
