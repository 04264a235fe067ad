"""Typed settings from YAML and dotted overrides, with every problem in one error. Knows no particular tree."""

import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from data.errors import ConfigError, reason

Settings = TypeVar("Settings", bound=BaseModel)
MOST = 100_000  # values in a file: aliases of aliases make more of a few lines, and fill the memory


def read_tree(path: Path | None, overrides: Sequence[str]) -> Any:
    """A YAML file of settings as plain values, with `key=value` overrides put in.

    Raises:
        ConfigError: it is no YAML file of settings, or an override is no value.
    """
    try:
        if path is not None:
            _refuse_bomb(path)
        tree: Any = OmegaConf.create({}) if path is None else OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise ConfigError(f"{path}: holds no mapping of settings; see the presets for the form")
        for override in overrides:
            tree = _override(tree, override)
        plain = OmegaConf.to_container(tree, resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML ({error.problem}); mend the line") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {reason(error)}") from None
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not a YAML file of settings ({reason(error)}); see the presets for the form"
        ) from None
    if "${" in str(plain):  # with the environment's variables, secrets would be written to files and to MLflow
        raise ConfigError(f"{path or '--set'}: ${{…}} is not filled in; write the value, or let a shell do it in --set")
    return plain


def _refuse_bomb(path: Path) -> None:
    """Raise a ConfigError where aliases would make more values than a memory holds."""
    root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    if root is not None and _values(root, {}) > MOST:
        raise ConfigError(f"{path}: more than {MOST} values, with its aliases written out; make it shorter")


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node holds with its aliases written out."""
    if id(node) not in known:
        known[id(node)] = MOST  # of one that holds itself
        parts = [node.value] if not isinstance(node.value, list) else node.value
        nodes = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_values(one, known) for one in nodes if isinstance(one, yaml.Node))
    return known[id(node)]


def _override(tree: Any, override: str) -> Any:
    if "=" not in override:
        raise ConfigError(f"--set {override}: write it as key=value, e.g. --set train.epochs=3")
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"--set {override}: not a value in YAML ({reason(error)}); quote it, as in --set 'key=\"value\"'"
        ) from None


def validated(kind: type[Settings], tree: Mapping[str, Any], source: str) -> Settings:
    """Plain values as typed settings.

    Raises:
        ConfigError: lists every problem, each with the key, the value, the rule and what to do.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise problems_error(source, [_problem(detail, kind) for detail in error.errors()]) from None


def problems_error(source: str, problems: Sequence[str]) -> ConfigError:
    """One error for all problems of a source."""
    unique = list(dict.fromkeys(problems))
    count = f"{len(unique)} problem{'s' if len(unique) > 1 else ''}"
    return ConfigError("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in unique)]))


def flat(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every setting of a section by its dotted key."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {f"{prefix}{name}": value}
    return found


def rule(detail: Any) -> str:
    """The rule that a value broke, of one of pydantic's errors."""
    text = str(detail["msg"]).removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def _problem(detail: Any, kind: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith(("literal[", "list[", "dict[")))
    if detail["type"] == "extra_forbidden":
        *path, leaf = detail["loc"]
        known = _fields(kind, path)
        near = get_close_matches(str(leaf), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{key}: missing; add it"
    given = detail["input"]
    section = isinstance(given, dict) and any(isinstance(value, dict) for value in given.values())
    return f"{key}: {rule(detail)}" if section else f"{key}: {given!r}: {rule(detail)}"


def _fields(kind: Any, path: Sequence[Any]) -> list[str]:
    """Names of the settings at a place of the tree; a mapping's keys are its user's own."""
    for name in path:
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            field = getattr(kind, "model_fields", {}).get(name)
            kind = None if field is None else field.annotation
    return list(getattr(kind, "model_fields", {}))
