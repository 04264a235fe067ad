"""The curves of a trial: a file of JSON lines that only ever grows, since its readers remember how far they got.

A line is {"time", "step", "attempt", "values"}, with "epoch" at the end of one and "note" for words. After a kill a
line may be torn, and steps that are done again are told again: readers pass over the first and drop the second.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
