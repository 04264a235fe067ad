"""What changed since a sweep started, and whether it may; and what `sweep run` would do now.

A started sweep takes what leaves its trials comparable: more trials, other resources, a wider space. All else is
refused before anything is written.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError
from sweep.config.files import load, write
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.space import Axis

Verdict = Literal["taken", "refused"]
# Settings that a started sweep takes, with what its user should know.
FREE = {
    "search.trials": "",
    "resources.slots": "",
    "resources.workers": "results are the same without dropout, whose draws follow the workers",
    "resources.cpus_per_worker": "",
    "resources.gpus_per_worker": "results of CPUs and GPUs differ in the last digits",
    "storage.keep": "",
    "storage.mirror": "",
    "storage.features": "",
    "storage.cache": "",
    "train.token_budget": "results are the same in fp32 without dropout, whose draws follow the cut",
    "train.checkpoint_steps": "",
    "train.checkpoint_seconds": "",
    "data.reader": "",
}
REASONS = {
    "name": "it names the ledger and the MLflow experiment",
    "seed": "trials would not be comparable",
    "data.": "trials would not be comparable",
    "tasks.": "trials would not be comparable",
    "model.": "trials would not be comparable",
    "train.": "trials would not be comparable",
    "search.metric": "trials were judged by the former one",
    "search.pruning": "trials were pruned by the former rule",
    "search.startup_trials": "trials were drawn by the former one",
    "storage.ledger": "the trials so far would be left behind",
}
FIRST_EPOCH = "search.pruning.first_epoch"


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was."""

    key: str
    before: Any
    after: Any
    verdict: Verdict
    why: str  # of a refusal; or what to know

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} → {_shown(self.after)}"


@dataclass(frozen=True)
class Changes:
    """All settings that are not what they were."""

    all: tuple[Change, ...]

    @property
    def refused(self) -> list[Change]:
        """Those that a started sweep cannot take."""
        return [change for change in self.all if change.verdict == "refused"]

    def refusal(self, folder: Path) -> str:
        """The message about them: the difference, then the reasons."""
        listed = "; ".join(map(str, self.refused))
        reasons: dict[str, list[str]] = {}
        for change in self.refused:
            reasons.setdefault(change.why, []).append(change.key)
        lines = [f"{folder}: started with other settings ({listed}); use --out for a new folder"]
        return "\n".join([*lines, *(f"  - {', '.join(keys)}: {why}" for why, keys in reasons.items())])


def compare(before: Config, after: Config) -> Changes:
    """What differs between the configuration that a sweep started with and another one."""
    old, new = flat(before), flat(after)
    found = list(_first_epoch(before, after))
    for key in {**old, **new}:
        one, other = old.get(key), new.get(key)  # settings of a section that is null are not there
        if one == other or key == FIRST_EPOCH:
            continue
        if key == "search.space":
            found += _space(before, after)
        elif key == "search.points":
            found.append(_points(before.search.points, after.search.points))
        elif key in FREE:
            found.append(Change(key, one, other, "taken", FREE[key]))
        else:
            why = next((why for start, why in REASONS.items() if key.startswith(start)), "it decides the trials")
            found.append(Change(key, one, other, "refused", why))
    return Changes(tuple(found))


def _first_epoch(before: Config, after: Config) -> Iterable[Change]:
    """What counts is the epoch that comes out: null follows `train.epochs`, of which a wider axis may have more."""
    was, will_be = (flat(config).get(FIRST_EPOCH) for config in (before, after))
    one, other = (config.search.first_rung(config.train.epochs) for config in (before, after))
    if one != other:
        way_out = f"; set it to {one}" if one is not None and other is not None else ""
        yield Change(FIRST_EPOCH, one, other, "refused", f"{REASONS['search.pruning']}{way_out}")
    elif was != will_be:
        yield Change(FIRST_EPOCH, was, will_be, "taken", f"epoch {one} as before")


def _points(before: list[Any], after: list[Any]) -> Change:
    if after[: len(before)] == before:
        return Change("search.points", before, after, "taken", "new points run next")
    why = "points were started in their order; new ones go behind them"
    return Change("search.points", before, after, "refused", why)


def _space(before: Config, after: Config) -> Iterable[Change]:
    old, new = before.search.space, after.search.space
    for key in {**old, **new}:
        name, one, other = f"search.space.{key}", old.get(key), new.get(key)
        if one == other:
            continue
        if other is None:
            yield Change(name, one, None, "refused", "trials vary it; put the axis back")
        elif one is None:
            yield _new_axis(name, flat(before)[key], other)
        else:
            why = _narrowing(one, other)
            verdict: Verdict = "refused" if why else "taken"
            yield Change(name, one, other, verdict, why or "wider: trials so far count within it")


def _new_axis(name: str, setting: Any, axis: Axis) -> Change:
    if axis.contains(setting):
        return Change(name, setting, axis, "taken", f"new axis: trials so far have {setting!r} on it")
    why = f"trials so far have {setting!r}, which a new axis must contain"
    return Change(name, setting, axis, "refused", why)


def _narrowing(before: Axis, after: Axis) -> str:
    """Why one axis does not hold all of another; empty if it does."""
    if before.when != after.when:
        return "trials were drawn under the former condition"
    if (before.choices is None) != (after.choices is None):
        return "a list of choices cannot become a range, nor a range a list"
    if before.choices is not None and after.choices is not None:
        kept = set(map(repr, after.choices))  # 1, 1.0 and true are different settings
        gone = [choice for choice in before.choices if repr(choice) not in kept]
        return f"narrower: {', '.join(map(repr, gone))} would be left out" if gone else ""
    kinds = [(axis.log, axis.step, isinstance(axis.distribution().low, int)) for axis in (before, after)]
    if kinds[0] != kinds[1]:
        return "log, step, and whole numbers must stay as they are"
    if not (after.contains(before.low) and after.contains(before.high)):
        return "narrower: the range must hold all of the former one, and its steps"
    return ""


def _shown(value: Any) -> str:
    if not isinstance(value, Axis):
        return repr(value)
    set_ = value.model_dump(exclude_defaults=True)
    return repr(set_["choices"] if set_.keys() == {"choices"} else set_)


def claim_folder(config: Config, folder: Path) -> None:
    """Write the configuration into a new folder, or over that of a sweep which can take the changes.

    Raises:
        ConfigError: the folder belongs to other settings (see `sweep.changes`); nothing is written then.
    """
    pass  # DROPPED

    path = folder / "config.yaml"
    if path.exists():
        changes = compare(load(str(path)), config)
        if changes.refused:
            raise ConfigError(changes.refusal(folder))
    folder.mkdir(parents=True, exist_ok=True)
    write(config, path)
