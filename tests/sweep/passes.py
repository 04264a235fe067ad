"""Frozen passes for the tests of this folder, computed without Ray."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from data.shards.dataset import Shards
from sweep.config.schema import Config, parse
from sweep.preflight import cache_passes as frozen
from sweep.preflight.cache_passes import CacheRequest, compute, folders_for, needs

Jobs = Sequence[Any]


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let passes be computed here; a list that grows with the files."""
    found: list[str] = []

    def here(jobs: Jobs, **resources: float) -> Iterator[pa.Table]:
        assert resources == {"cpus": 1, "gpus": 0}
        for job in jobs:
            folders = getattr(job, "recipes", None) or [job.folder]
            found.extend(f"{folder.name}/{job.part.name}" for folder in folders)
            yield job()

    monkeypatch.setattr(frozen, "ray_jobs", here)
    monkeypatch.setattr(frozen, "SMALL", 0)
    return found


def killed_and_continued(
    one: Config, cache: Path, files: ModuleType, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> CacheRequest:
    """Compute the passes of a sweep, with a kill after two of its files; what came before is not computed again."""
    written, write = iter(range(2)), files.write

    def failing(*args: Any) -> int:
        if next(written, None) is None:
            raise KeyboardInterrupt
        size: int = write(*args)
        return size

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            compute(one, cache, lambda text: None)
    [need] = needs(one, cache)
    assert len(need.missing) == len(need.parts) - 2 > 0
    assert set(folders_for(one, cache).values()) == {None}  # its trials would compute by themselves
    before = len(made)
    compute(one, cache, lambda text: None)
    assert len(made) - before == len(need.parts) - 2
    return need


def config(models: Path, shards: Shards, space: dict[str, Any] | None = None, **changed: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "test",
        "data": {"shards": str(shards.folder)},
        "model": {"encoder": {"path": str(models / "whisper")}, "llm": {"path": str(models / "llm")}},
        "search": {"space": space or {}},
    }
    for key, value in changed.items():
        tree[key] = tree.get(key, {}) | value
    return parse(tree, "test")
