"""The version of the code that runs."""

import functools
import hashlib
from importlib import metadata
from pathlib import Path

SOURCES = ("data", "model", "sweep")


@functools.cache
def code_version() -> str:
    """The version of this project, and a hash over its source files: equal where the code is."""
    content = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            content.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    try:
        version = metadata.version("speech-llm-sweep")
    except metadata.PackageNotFoundError:  # run from a working directory that was shipped as it is
        version = "source"
    return f"{version}+{content.hexdigest()[:10]}"
