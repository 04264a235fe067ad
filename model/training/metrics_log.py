"""The metrics log of a trial, metrics.jsonl: a file that only grows, since readers remember how far they have read.

A line is {"time", "step", "attempt", "values"}; the line that ends an epoch has "epoch" as well, and a message has
"note" and no values. After a kill a line may be torn, and steps that are repeated are logged again: readers skip torn
lines, and of several values of a metric at the same step the first one counts.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

FILE = "metrics.jsonl"
TAIL = 1 << 16  # bytes at the end of a file that contain several lines of the longest kind


class Point(NamedTuple):
    """A value of a metric."""

    name: str
    step: int  # training examples seen
    milliseconds: int  # since 1970, when it was measured
    value: float


class Line(NamedTuple):
    """A line as it was read; a field is None where it is missing or has another type."""

    values: dict[str, float]  # those that are numbers: a tracking server refuses others, and all points beside them
    time: float | None  # seconds since 1970
    step: int | None
    attempt: int | None
    epoch: int | None
    note: str | None

    def points(self) -> Iterator[Point]:
        """Yield the values as points."""
        if self.step is not None and self.time is not None:
            for name, value in self.values.items():
                yield Point(name, self.step, int(self.time * 1000), float(value))


def parse(content: bytes) -> Iterator[Line]:
    """Yield the complete lines of a file's content; torn ones are skipped."""
    for text in content.split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("values"), dict):
            time, step, attempt, epoch, note = (line.get(key) for key in ("time", "step", "attempt", "epoch", "note"))
            yield Line(
                values={name: value for name, value in line["values"].items() if isinstance(value, int | float)},
                time=time if isinstance(time, int | float) else None,
                step=step if isinstance(step, int) else None,
                attempt=attempt if isinstance(attempt, int) else None,
                epoch=epoch if isinstance(epoch, int) else None,
                note=note if isinstance(note, str) else None,
            )


class MetricsLog:
    """The metrics log in the folder of a trial."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def append(
        self,
        values: Mapping[str, float],
        *,
        time: float,
        step: int,
        attempt: int,
        epoch: int | None = None,
        note: str | None = None,
    ) -> None:
        """Append a line; a torn line that a kill has left before it stays on a line of its own.

        Args:
            values: by metric.
            time: seconds since 1970.
            step: training examples seen.
            attempt: at the trial, counted from 1.
            epoch: that ends with these values.
            note: a message.

        Raises:
            OSError: the file is unchanged.
        """
        line: dict[str, object] = {"time": time, "step": step, "attempt": attempt}
        line |= {} if epoch is None else {"epoch": epoch}
        line |= {"values": dict(values)} | ({} if note is None else {"note": note})
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            content = (b"\n" if is_torn else b"") + json.dumps(line).encode() + b"\n"
            try:
                while content:  # a disk that is nearly full accepts a part
                    content = content[os.write(descriptor, content) :]
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Flush the log to the disk."""
        if self.path.exists():
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def lines(self) -> list[Line]:
        """Return all complete lines."""
        return list(parse(self.path.read_bytes())) if self.path.exists() else []

    def last_attempt(self) -> int | None:
        """Return the newest attempt that wrote a line; None if there is none."""
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - TAIL))
            content = file.read()
        return max((line.attempt for line in parse(content) if line.attempt is not None), default=None)

    def time_range(self) -> tuple[int, int] | None:
        """Return when the first and the last point were measured, in milliseconds since 1970."""
        times = [point.milliseconds for point in MetricsReader(self.path.parent).read()]
        return (min(times), max(times)) if times else None


class MetricsReader:
    """Reads the points of a growing metrics log, each (metric, step) once; a point that comes late fills its gap.

    Args:
        folder: of the trial.
        steps: by metric, the steps whose points are not needed any more.
    """

    def __init__(self, folder: Path, steps: Mapping[str, set[int]] | None = None) -> None:
        self.path = folder / FILE
        self.offset = 0  # bytes that were read
        self.steps: dict[str, set[int]] = {name: set(numbers) for name, numbers in (steps or {}).items()}

    def skip(self, offset: int) -> bool:
        """Mark the points of the first `offset` bytes as read; return False when the file is shorter than that."""
        if offset > (self.path.stat().st_size if self.path.exists() else 0):
            return False
        self._new_points(self._content(offset))
        return True

    def read(self) -> list[Point]:
        """Return the new points of all lines that were completed since the last call."""
        return self._new_points(self._content())

    def last_steps(self) -> dict[str, int]:
        """Return the last step by metric."""
        return {name: max(steps) for name, steps in self.steps.items() if steps}

    def _content(self, end: int | None = None) -> bytes:
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read() if end is None else file.read(end - self.offset)
        return content[: content.rfind(b"\n") + 1]

    def _new_points(self, content: bytes) -> list[Point]:
        points = []
        for line in parse(content):
            for point in line.points():
                steps = self.steps.setdefault(point.name, set())
                if point.step not in steps:
                    steps.add(point.step)
                    points.append(point)
        self.offset += len(content)
        return points
