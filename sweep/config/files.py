"""Read and write configurations as YAML; find presets."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from data.atomic import write_file
from data.errors import ConfigError
from sweep.config.loader import problems_error, read_tree
from sweep.config.schema import Config, parse
from sweep.config.search_checks import _space_problems


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or a YAML file, apply `key=value` overrides, and check the whole, the search space included.

    Raises:
        ConfigError: the file is missing or not YAML, or lists every problem of its content.
    """
    path = _find(name)
    plain = read_tree(path, overrides)
    _fix_axes(plain, [override.partition("=")[0] for override in overrides])
    config = parse(plain, str(path))
    problems = list(_space_problems(config))
    if problems:
        raise problems_error(str(path), problems)
    return config


def _fix_axes(tree: Any, keys: Sequence[str]) -> None:
    """A setting that is given on the command line is no axis any more; points with another value of it fall away."""
    search: Any = tree.get("search") if isinstance(tree, dict) else None
    space: Any = search.get("space") if isinstance(search, dict) else None
    if not isinstance(space, dict):
        return
    for key in keys:
        if space.pop(key, None) is None or not isinstance(search.get("points"), list):
            continue
        value: Any = tree
        for name in key.split("."):
            value = value[name]
        points = [point for point in search["points"] if not isinstance(point, dict) or point.get(key, value) == value]
        search["points"] = [
            {name: own for name, own in point.items() if name != key} if isinstance(point, dict) else point
            for point in points
        ]


def presets() -> list[str]:
    """Names of the presets that ship with the project."""
    folder = resources.files("sweep.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def dump(config: Config) -> str:
    """The configuration as YAML that `load` reads back."""
    text: str = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)
    return text


def write(config: Config, path: Path) -> None:
    """Write the configuration as YAML, complete or not at all."""
    write_file(path, dump(config))


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if name in presets():
        return Path(str(resources.files("sweep.config") / "presets" / f"{name}.yaml"))
    near = get_close_matches(name, presets(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name}: no such file, and no preset of that name (presets: {', '.join(presets())}){hint}")
