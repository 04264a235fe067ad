"""Typed settings of any kind from YAML and `key=value` overrides, with all problems in one error.

read_tree ─► apply_overrides ─► validate
"""

import contextlib
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from data.errors import ConfigError, reason

Settings = TypeVar("Settings", bound=BaseModel)
Tree = dict[str, object]  # settings as plain values, sections as mappings
MOST = 100_000  # values in a document: a few lines of aliases of aliases can make enough to fill the memory
INTERPOLATION = "${"
NESTING, FLAT = "[{-?:", 2000  # characters that may begin a level, and how many of them are no danger


def load_settings(kind: type[Settings], path: Path | None, overrides: Sequence[str]) -> Settings:
    """Read a YAML file if there is one, apply overrides, and validate the result.

    Raises:
        ConfigError: see `read_tree`, `apply_overrides` and `validate`.
    """
    tree = {} if path is None else read_tree(path)
    return validate(kind, apply_overrides(tree, overrides), str(path or "--set"))


def read_tree(path: Path) -> Tree:
    """Read a YAML file of settings.

    Raises:
        ConfigError: the file is not YAML, is no mapping, is too large, or asks for interpolation.
    """
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML ({error.problem}); fix the line") from None
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not a YAML file of settings ({reason(error)}); see the presets for the form"
        ) from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}: not a mapping of settings; see the presets for the form")
    return tree or {}


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return the tree with `key=value` overrides put in: dotted keys, values in YAML; see `merged`.

    Raises:
        ConfigError: an override has no `=`, or its value is not YAML.
    """
    for text in overrides:
        path, value = parse_override(text)
        tree = with_value(tree, path, merged(value_at(tree, path), value))
    return tree


def override(key: str, value: object) -> str:
    """Return the override that sets a key to a plain value, for `apply_overrides`; a shell needs it quoted."""
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            if value.isprintable() and _parse_yaml(value, key) == value:
                return f"{key}={value}"
    text = json.dumps(value, ensure_ascii=False)
    return f"{key}={''.join(character if character.isprintable() else _escaped(character) for character in text)}"


def _escaped(character: str) -> str:
    """Return the escape of a character within double quotes in YAML, which reads only printable ones as they are."""
    code = ord(character)
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"


def parse_override(
    text: str, split: Callable[[str], list[str]] = lambda key: key.split(".")
) -> tuple[list[str], object]:
    """Return the path of keys and the value of a `key=value` override.

    Args:
        text: a dotted key, and a value in YAML.
        split: returns the path of a dotted key, for trees whose keys may have dots themselves.

    Raises:
        ConfigError: it has no `=`, or its value is not YAML.
    """
    key, equals, content = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: write it as key=value, e.g. --set train.epochs=3")
    try:
        value = _parse_yaml(content, f"--set {key}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--set {text}: not a value in YAML ({reason(error)}); quote it, as in --set 'key=\"value\"'"
        ) from None
    return split(key), value


def value_at(tree: object, path: Sequence[str]) -> object:
    """Return the value at a path of keys; None where the tree has none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def with_value(tree: object, path: Sequence[str], value: object) -> Tree:
    """Return a copy of a tree with a new value at a path of keys; a value on the path becomes a section."""
    section: Tree = dict(tree) if isinstance(tree, dict) else {}
    name, *rest = path
    section[name] = with_value(section.get(name), rest, value) if rest else value
    return section


def merged(before: object, after: object) -> object:
    """Return a new value; a mapping over a mapping keeps the keys that it does not name, and an empty one clears it."""
    if not isinstance(before, dict) or not isinstance(after, dict) or not after:
        return after
    return before | {name: merged(before.get(name), value) for name, value in after.items()}


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number and 2020-01-01 a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


class _FastLoader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """The same in C, twenty times as fast."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _parse_yaml(text: str, source: str) -> object:
    """Return the one document of a text as plain values.

    Raises:
        ConfigError: it is too large, or asks for interpolation.
    """
    # In C, values that are nested too deeply would end the process, where Python raises a RecursionError.
    loader = (_FastLoader if sum(map(text.count, NESTING)) <= FLAT else _Loader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MOST:
            raise ConfigError(f"{source}: more than {MOST} values, with its aliases written out; make it shorter")
        value: object = loader.construct_document(node)
    except (KeyError, TypeError, IndexError, AttributeError) as error:  # PyYAML's own, for `!!bool x` and the like
        raise yaml.YAMLError(f"a tag that does not fit its value, {reason(error)}") from None
    finally:
        loader.dispose()
    if INTERPOLATION in str(value):  # filled in from the environment, secrets would reach files and MLflow
        raise ConfigError(f"{source}: ${{…}} is not filled in; write the value, or let a shell do it in --set")
    return value


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return how many values a node holds with its aliases written out; refuse a mapping that has a key twice."""
    if id(node) not in counts:
        counts[id(node)] = MOST  # of a node that contains itself
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            names = set[str]()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in names:
                        raise yaml.MarkedYAMLError(None, None, f"found duplicate key {key.value}", key.start_mark)
                    names.add(key.value)
            children = [child for pair in node.value for child in pair]
        counts[id(node)] = 1 + sum(_count(child, counts) for child in children)
    return counts[id(node)]


def validate(kind: type[Settings], tree: Mapping[str, object], source: str) -> Settings:
    """Return plain values as typed settings.

    Raises:
        ConfigError: lists every problem, each with the key, the value, the rule and what to do.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise problems_error(source, [_problem(detail, kind) for detail in error.errors()]) from None


def problems_error(source: str, problems: Sequence[str]) -> ConfigError:
    """Return one error for all problems of a source."""
    unique = list(dict.fromkeys(problems))
    count = f"{len(unique)} problem{'s' if len(unique) > 1 else ''}"
    return ConfigError("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in unique)]))


class _Same:
    """A section as a key of a cache. Sections cannot be changed, so the same object has the same settings."""

    def __init__(self, section: BaseModel) -> None:
        self.section = section

    def __hash__(self) -> int:
        return id(self.section)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.section is self.section


def flat(section: BaseModel) -> dict[str, Any]:
    """Return every setting of a section by its dotted key."""
    return dict(_flat(_Same(section)))


@functools.lru_cache(maxsize=8)  # a search asks for the settings of its sweep with every trial
def _flat(same: _Same) -> dict[str, Any]:
    def settings(section: BaseModel, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in type(section).model_fields:
            value = getattr(section, name)
            key = f"{prefix}{name}"
            found |= settings(value, f"{key}.") if isinstance(value, BaseModel) else {key: value}
        return found

    return settings(same.section, "")


def rule(detail: ErrorDetails) -> str:
    """Return the rule that a value broke."""
    text = detail["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def _problem(detail: ErrorDetails, kind: type[BaseModel]) -> str:
    """Return a line with the key, the value, the rule and what to do."""
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith(("literal[", "list[", "dict[")))
    if detail["type"] == "extra_forbidden":
        *path, leaf = detail["loc"]
        names = list(_settings(kind, path))
        near = get_close_matches(str(leaf), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
        return f"{key}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{key}: missing; add it"
    given = detail["input"]
    if detail["type"] == "model_type":
        settings = _settings(kind, detail["loc"])
        choice = next((name for name, field in settings.items() if given in typing.get_args(field.annotation)), None)
        hint = f"write {key}.{choice}={given}" if choice else f"set its keys: {', '.join(settings)}"
        return f"{key}: {given!r}: this is a section of settings, not a value; {hint}"
    if detail["type"] == "list_type" and isinstance(given, dict) and all(str(name).isdigit() for name in given):
        return f"{key}: {given!r}: {rule(detail)}; write the whole list, as in {key}=[…]"
    section = isinstance(given, dict) and any(isinstance(value, dict) for value in given.values())
    return f"{key}: {rule(detail)}" if section else f"{key}: {given!r}: {rule(detail)}"


def _settings(kind: object, path: Sequence[int | str]) -> dict[str, FieldInfo]:
    """Return the settings at a path of the tree by name; none within a mapping whose keys are free."""
    for name in path:
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            field = getattr(kind, "model_fields", {}).get(name)
            kind = None if field is None else field.annotation
            if isinstance(kind, types.UnionType):  # a section that null turns off
                kind = next((member for member in kind.__args__ if hasattr(member, "model_fields")), kind)
    return dict(getattr(kind, "model_fields", {}))
