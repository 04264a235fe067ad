"""Read and write configurations as YAML; find presets."""

import contextlib
import json
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError

from data.atomic import write_file
from data.errors import ConfigError
from model.config import PromptConfig
from sweep.config.loader import Tree, merged, parse_override, read_tree, value_at, with_value
from sweep.config.schema import DEFAULTS, Config, parse, split_key
from sweep.config.search_checks import check_search
from sweep.config.space import Axis

SPACE, POINTS = ("search", "space"), ("search", "points")
BOS = ("model", "prompt", "bos")


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or a YAML file, apply `key=value` overrides, validate the result and check its search space.

    Raises:
        ConfigError: the file is missing or not YAML, or lists every problem of its content.
    """
    path = _find(name)
    config = parse(override_sweep(_with_former_values(read_tree(path)), overrides), str(path))
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


def override_sweep(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return the tree of a sweep with `key=value` overrides put in, one after another.

    A setting that is overridden is no axis any more, and an axis that is null is removed. Points that have another
    value of such a setting, or a value outside of an axis that is overridden, are removed, too.

    Raises:
        ConfigError: an override has no `=`, or its value is not YAML.
    """
    for text in overrides:
        path, value = parse_override(text, split_key)
        before = _section(value_at(tree, SPACE))
        if path[3:4] == ["when"] and isinstance(choices := before.get(path[2]), list):
            tree = with_value(tree, path[:3], {"choices": choices})
        searched = ".".join(path) in before  # its values are whole choices, so a mapping is not merged
        tree = with_value(tree, path, value if searched else merged(value_at(tree, path), value))
        space = _section(value_at(tree, SPACE))
        kept = {
            key: axis
            for key, axis in space.items()
            if axis is not None and not _names(path, value, str(key).split("."))
        }
        if len(kept) < len(space):
            tree = with_value(tree, SPACE, kept)
        removed = [key for key in before if key not in kept]
        changed = {key: axis for key, axis in kept.items() if axis != before.get(key)}
        if removed or changed:
            tree = _fitting_points(tree, removed, changed)
    return tree


def _section(value: object) -> Tree:
    return value if isinstance(value, dict) else {}


def _names(path: Sequence[str], value: object, key: Sequence[str]) -> bool:
    """Return whether an override sets a setting, or a part of it."""
    if len(path) >= len(key):
        return list(path[: len(key)]) == list(key)
    if list(path) != list(key[: len(path)]):
        return False
    for name in key[len(path) :]:
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    return True


def _fitting_points(tree: Tree, removed: Sequence[str], changed: Tree) -> Tree:
    """Return the tree without the points that do not fit new axes or settings, and without removed axes in others."""
    points = value_at(tree, POINTS)
    if not isinstance(points, list):
        return tree
    axes = dict[str, Axis]()
    for key, axis in changed.items():
        with contextlib.suppress(ValidationError):  # reported when the whole tree is validated
            axes[key] = Axis.model_validate(axis)
    kept = list[object]()
    for point in points:
        rest = point
        if isinstance(point, dict):
            if any(key in point and point[key] != _setting(tree, key) for key in removed) or any(
                key in point and not axis.contains(point[key]) for key, axis in axes.items()
            ):
                continue
            rest = {name: value for name, value in point.items() if name not in removed}
            if rest != point and (not rest or rest in kept):  # it names nothing, or only what another one does
                continue
        kept.append(rest)
    return with_value(tree, POINTS, kept)


def _setting(tree: Tree, key: str) -> object:
    """Return the value of a setting in a tree, or else its default."""
    section = value_at(tree, key.split(".")[:-1])
    name = key.rpartition(".")[2]
    return section[name] if isinstance(section, dict) and name in section else DEFAULTS.get(key)


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
