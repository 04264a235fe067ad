"""Configurations of sweeps with the tiny models, for tests of what happens before the trials start."""

from pathlib import Path
from typing import Any

from data.shards.dataset import Shards
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.config.schema import parse


def config(models: Path, shards: Shards, space: dict[str, Any] | None = None, **changed: Any) -> ResolvedConfig:
    """Return a configuration; `changed` replaces settings of a section."""
    tree: dict[str, Any] = {
        "name": "test",
        "data": {"shards": str(shards.folder)},
        "model": {"encoder": {"path": str(models / "whisper")}, "llm": {"path": str(models / "llm")}},
        "search": {"space": space or {}},
    }
    for key, value in changed.items():
        tree[key] = tree.get(key, {}) | value
    return resolve(parse(tree, "test"))
