"""The version of the running code."""

import functools
import hashlib
from importlib import metadata
from pathlib import Path

SOURCES = ("data", "model", "sweep")


@functools.cache
def code_version() -> str:
    """Return the version of this project and a hash of its source files."""
    content = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            content.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    try:
        version = metadata.version("speech-llm-sweep")
    except metadata.PackageNotFoundError:  # run from sources that were not installed, as in a Ray job
        version = "source"
    return f"{version}+{content.hexdigest()[:10]}"
