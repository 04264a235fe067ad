"""Read and write configurations as YAML; find presets."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

import yaml

from data.atomic import write_file
from data.errors import ConfigError
from model.config import PromptConfig
from sweep.config.loader import Tree, apply_overrides, read_tree, value_at, with_value
from sweep.config.schema import Config, parse
from sweep.config.search_checks import check_search

SPACE, POINTS = ("search", "space"), ("search", "points")
BOS = ("model", "prompt", "bos")


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or a YAML file, apply `key=value` overrides, validate the result and check its search space.

    Raises:
        ConfigError: the file is missing or not YAML, or lists every problem of its content.
    """
    path = _find(name)
    tree = apply_overrides(_with_former_values(read_tree(path)), overrides)
    tree = _without_axes(tree, [override.partition("=")[0] for override in overrides])
    config = parse(tree, str(path))
    check_search(config, str(path))
    return config


def _with_former_values(tree: Tree) -> Tree:
    """Return the tree of a former version with the values that settings stood for before they existed.

    `write` writes every setting. A file that has all settings of a prompt but one was written before that one existed,
    and its checkpoints were trained accordingly.
    """
    prompt = value_at(tree, BOS[:-1])
    if isinstance(prompt, dict) and prompt.keys() == PromptConfig.model_fields.keys() - {BOS[-1]}:
        return with_value(tree, BOS, "always")
    return tree


def _without_axes(tree: Tree, keys: Sequence[str]) -> Tree:
    """Return the tree without the axes of overridden settings, and without points that have another value on them."""
    for key in keys:
        space, points = value_at(tree, SPACE), value_at(tree, POINTS)
        if not isinstance(space, dict) or key not in space:
            continue
        tree = with_value(tree, SPACE, _without(space, key))
        if isinstance(points, list):
            value = value_at(tree, key.split("."))
            kept = [point for point in points if not isinstance(point, dict) or point.get(key, value) == value]
            tree = with_value(tree, POINTS, [_without(point, key) for point in kept])
    return tree


def _without(section: object, key: str) -> object:
    return {name: value for name, value in section.items() if name != key} if isinstance(section, dict) else section


def presets() -> list[str]:
    """Return the names of the presets that ship with the project."""
    folder = resources.files("sweep.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def dump(config: Config) -> str:
    """Return the configuration as YAML that `load` reads back."""
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
