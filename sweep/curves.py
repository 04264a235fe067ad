"""The write-ahead file of a trial, `metrics.jsonl`: every (metric, step) of it once, whatever interrupted its writer.

A trial that goes on from its checkpoint repeats, bit for bit, the steps that were made after it: of the points of a
step the first counts. Half a line, as a kill in mid-write leaves it, is passed over once its line has ended; a half at
the end of the file waits for its other half.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from model.curve import FILE, lines

TAIL = 1 << 16  # bytes; several lines of the longest kind


class Point(NamedTuple):
    """A value of a metric."""

    name: str
    step: int
    milliseconds: int  # since 1970, when it was measured
    value: float


class Curve:
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
    found = [point.milliseconds for point in Curve(folder).read()]
    return (min(found), max(found)) if found else None


def _points(line: dict[str, Any]) -> Iterator[Point]:
    step, seconds = line.get("step"), line.get("time")
    if isinstance(step, int) and isinstance(seconds, int | float):
        for name, value in line["values"].items():
            if isinstance(value, int | float):  # anything else the server would refuse, and all points beside it
                yield Point(name, step, int(seconds * 1000), float(value))
