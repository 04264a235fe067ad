"""The curves of a trial: a file of JSON lines that only ever grows, since its readers remember how far they got.

A line is {"time", "step", "attempt", "values"}, with "epoch" at the end of one and "note" for words. After a kill a
line may be torn, and steps that are done again are told again: readers pass over the first and drop the second.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE = "metrics.jsonl"


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line; half a line that a kill has left before it stays alone.

    Raises:
        OSError: the file is then as it was before.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = (b"\n" if torn else b"") + json.dumps(line).encode() + b"\n"
        try:
            while content:  # a disk that is nearly full takes a part
                content = content[os.write(descriptor, content) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def lines(content: bytes) -> Iterator[dict[str, Any]]:
    """The complete lines of a file's content; torn ones are passed over."""
    for line in content.split(b"\n")[:-1]:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("values"), dict):
            yield found


def epochs(path: Path) -> set[int]:
    """The epochs whose end the curves tell already."""
    if not path.exists():
        return set()
    return {line["epoch"] for line in lines(path.read_bytes()) if "epoch" in line}


def sync(path: Path) -> None:
    """Bring the curves down to the disk."""
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


TAIL = 1 << 16  # bytes; several lines of the longest kind


class Point(NamedTuple):
    """A value of a metric."""

    name: str
    step: int
    milliseconds: int  # since 1970, when it was measured
    value: float


class MetricsLog:
    """Reads the points of a trial as they come; remembers which it gave, exactly: a late point fills its hole."""

    def __init__(self, folder: Path, known: Mapping[str, set[int]] | None = None) -> None:
        self.path = folder / FILE
        self.offset = 0  # bytes that were read
        self.known: dict[str, set[int]] = {name: set(steps) for name, steps in (known or {}).items()}

    def skip(self, offset: int) -> bool:
        """Take the points of the first `offset` bytes as given; False when the file is shorter than that."""
        if offset > (self.path.stat().st_size if self.path.exists() else 0):
            return False
        self._new(self._content(offset))
        return True

    def read(self) -> list[Point]:
        """The points of all lines that were completed since the last call and whose steps are new."""
        return self._new(self._content())

    def highest(self) -> dict[str, int]:
        """The newest step by metric."""
        return {name: max(steps) for name, steps in self.known.items() if steps}

    def _content(self, end: int | None = None) -> bytes:
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read() if end is None else file.read(end - self.offset)
        return content[: content.rfind(b"\n") + 1]

    def _new(self, content: bytes) -> list[Point]:
        points = []
        for line in lines(content):
            for point in _points(line):
                steps = self.known.setdefault(point.name, set())
                if point.step not in steps:
                    steps.add(point.step)
                    points.append(point)
        self.offset += len(content)
        return points


def attempts(folder: Path) -> int | None:
    """The newest attempt that wrote into a trial's file, which counts from 1; None where none says so."""
    path = folder / FILE
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        content = file.read()
    return max((line["attempt"] for line in lines(content) if isinstance(line.get("attempt"), int)), default=None)


def times(folder: Path) -> tuple[int, int] | None:
    """When the first and the last point of a trial were measured, in milliseconds."""
    found = [point.milliseconds for point in MetricsLog(folder).read()]
    return (min(found), max(found)) if found else None


def _points(line: dict[str, Any]) -> Iterator[Point]:
    step, seconds = line.get("step"), line.get("time")
    if isinstance(step, int) and isinstance(seconds, int | float):
        for name, value in line["values"].items():
            if isinstance(value, int | float):  # anything else the server would refuse, and all points beside it
                yield Point(name, step, int(seconds * 1000), float(value))
