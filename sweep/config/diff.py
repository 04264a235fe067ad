"""Compare the settings of a started sweep with those it is asked to resume with.

A started sweep accepts changes that leave its trials comparable: more trials, other resources, a wider space. It
refuses all other changes before anything is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import ConfigError
from sweep.config.files import load, write
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.search import SearchConfig
from sweep.config.space import Axis

Verdict = Literal["accepted", "refused"]
# Settings that may change, with what the user should know.
ACCEPTED = {
    "search.trials": "",
    "search.stop_when": "",
    "search.tie_share": "",
    "search.sampler": "it draws the trials from now on",
    "resources.slots": "",
    "resources.workers": "results are the same without dropout, whose random numbers depend on the workers",
    "resources.shard": "",
    "resources.cpus_per_worker": "",
    "resources.gpus_per_worker": "results of CPUs and GPUs differ in the last digits",
    "storage.keep": "",
    "storage.mirror": "",
    "storage.features": "",
    "storage.cache": "",
    "model.llm.attention": "results are the same in fp32",
    "model.llm.gradient_checkpointing": "",
    "train.token_budget": "results are the same in fp32 without dropout, whose random numbers depend on the budget",
    "train.packing": "results are the same in fp32 without dropout, whose random numbers depend on the micro-batches",
    "train.compile": "results are the same up to rounding",
    "train.kernels": "results are the same up to rounding",
    "train.checkpoint_steps": "",
    "train.checkpoint_seconds": "",
    "data.reader": "",
}
# Why others may not, by the beginning of their key.
REASONS = {
    "name": "it names the study and the MLflow experiment",
    "seed": "trials would not be comparable",
    "data.": "trials would not be comparable",
    "tasks.": "trials would not be comparable",
    "model.": "trials would not be comparable",
    "train.": "trials would not be comparable",
    "search.metric": "existing trials were ranked by the previous metrics",
    "search.pruning": "existing trials were pruned by the previous rule",
    "search.fidelity": "existing trials were compared by the previous one",
    "search.learn_from": "existing trials were drawn with what was taken from other sweeps at the start",
    "search.startup_trials": "existing trials were sampled under the previous value",
    "storage.ledger": "existing trials would be left in the previous study",
}
BUDGET = "search.budget"  # a section that may be null
FIRST_EPOCH = "search.pruning.first_epoch"


@dataclass(frozen=True)
class Change:
    """A setting with different values before and after."""

    key: str
    before: object
    after: object
    verdict: Verdict
    why: str  # the reason of a refusal, or what the user should know

    def __str__(self) -> str:
        return f"{self.key}: {_format(self.before)} → {_format(self.after)}"


@dataclass(frozen=True)
class Changes:
    """All differences between two configurations."""

    all: tuple[Change, ...]

    @property
    def refused(self) -> list[Change]:
        """Changes that a started sweep cannot accept."""
        return [change for change in self.all if change.verdict == "refused"]

    def refusal(self, folder: Path) -> str:
        """Return the error message: the refused changes, then the reasons."""
        listed = "; ".join(map(str, self.refused))
        reasons: dict[str, list[str]] = {}
        for change in self.refused:
            reasons.setdefault(change.why, []).append(change.key)
        lines = [f"{folder}: started with different settings ({listed}); use --out for a new folder"]
        return "\n".join([*lines, *(f"  - {', '.join(keys)}: {why}" for why, keys in reasons.items())])


def compare(before: Config, after: Config) -> Changes:
    """Return the differences between the configuration of a started sweep and a new one, with their verdicts."""
    old, new = flat(before), flat(after)
    changes = list(_first_epoch(before, after))
    for key in {**old, **new}:
        former, latter = old.get(key), new.get(key)  # a section that is null has no settings
        if former == latter or key == FIRST_EPOCH:
            continue
        if key == "search.space":
            changes += _space(before, after)
        elif key == "search.points" and new[key][: len(old[key])] == old[key]:
            changes.append(Change(key, former, latter, "accepted", "new points run next"))
        elif key == "search.points":
            changes.append(Change(key, former, latter, "refused", "existing points keep their order; append new ones"))
        elif key in ACCEPTED or key.startswith(BUDGET):
            changes.append(Change(key, former, latter, "accepted", ACCEPTED.get(key, "")))
        else:
            why = next((why for start, why in REASONS.items() if key.startswith(start)), "it decides the trials")
            changes.append(Change(key, former, latter, "refused", why))
    return Changes(tuple(changes))


def _first_epoch(before: Config, after: Config) -> Iterator[Change]:
    """Compare the effective first epoch of pruning: null follows `train.epochs`, which a wider axis may raise."""
    was, becomes = (flat(config).get(FIRST_EPOCH) for config in (before, after))
    former, latter = (config.search.first_rung(config.train.epochs) for config in (before, after))
    if former != latter:
        fix = f"; set it to {former}" if former is not None and latter is not None else ""
        yield Change(FIRST_EPOCH, former, latter, "refused", f"{REASONS['search.pruning']}{fix}")
    elif was != becomes:
        yield Change(FIRST_EPOCH, was, becomes, "accepted", f"epoch {former} as before")


def _space(before: Config, after: Config) -> Iterator[Change]:
    """Compare the axes: an axis may become wider, and a new one must contain the setting of the existing trials."""
    old, new, settings = before.search.space, after.search.space, flat(before)
    for key in {**old, **new}:
        name, former, latter = f"search.space.{key}", old.get(key), new.get(key)
        if former == latter:
            continue
        if latter is None:
            yield Change(name, former, None, "refused", "existing trials vary it; put the axis back")
        elif former is None:
            setting = settings[key]
            if latter.contains(setting):
                yield Change(name, setting, latter, "accepted", f"new axis; existing trials have {setting!r} on it")
            else:
                why = f"existing trials have {setting!r}, which a new axis must contain"
                yield Change(name, setting, latter, "refused", why)
        elif why := _narrowing(former, latter):
            yield Change(name, former, latter, "refused", why)
        else:
            yield Change(name, former, latter, "accepted", "wider; existing trials lie within it")


def _narrowing(before: Axis, after: Axis) -> str:
    """Return why an axis does not contain all of the previous one; an empty string if it does."""
    if before.when != after.when:
        return "existing trials were drawn under the previous condition"
    if (before.choices is None) != (after.choices is None):
        return "a list of choices cannot become a range, nor a range a list"
    if before.choices is not None and after.choices is not None:
        kept = set(map(repr, after.choices))  # 1, 1.0 and true are different settings
        gone = [choice for choice in before.choices if repr(choice) not in kept]
        return f"narrower: {', '.join(map(repr, gone))} would be left out" if gone else ""
    kinds = [(axis.log, axis.step, isinstance(axis.distribution().low, int)) for axis in (before, after)]
    if kinds[0] != kinds[1]:
        return "log, step, and whole or fractional numbers must stay the same"
    if not (after.contains(before.low) and after.contains(before.last)):
        return "narrower: the range must contain the previous one and its steps"
    return ""


def _format(value: object) -> str:
    if not isinstance(value, Axis):
        return repr(value)
    settings = value.model_dump(exclude_defaults=True)
    return repr(settings["choices"] if settings.keys() == {"choices"} else settings)


def continued(config: Config, folder: Path) -> Config:
    """Return the configuration with which the sweep in a folder continues.

    `model.prompt.bos: auto` leaves the choice to the sweep, and one that has started keeps what its trials read: before
    the setting existed, that was always BOS. So does the default of `search.pruning`: before `kind` existed, it was
    always `stop`, and a mapping without a kind means that. And so does the default of `model.lora.targets`, which was
    another one.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return config
    started, kept = load(str(path)), dict[str, object]()
    if config.model.prompt.bos == "auto":
        kept["model.prompt.bos"] = started.model.prompt.bos
    if "targets" not in config.model.lora.model_fields_set:
        kept["model.lora.targets"] = started.model.lora.targets
    is_default = config.search.pruning == SearchConfig().pruning
    if is_default and started.search.pruning is not None and started.search.pruning.kind == "stop":
        kept["search.pruning"] = started.search.pruning.model_dump()
    return config.with_values(kept) if kept else config


def claim_folder(config: Config, folder: Path) -> None:
    """Write the configuration into a new folder, or over that of a sweep that accepts the changes.

    Raises:
        ConfigError: the folder was started with different settings; nothing is written then.
    """
    path = folder / "config.yaml"
    if path.exists():
        changes = compare(load(str(path)), config)
        if changes.refused:
            raise ConfigError(changes.refusal(folder))
    folder.mkdir(parents=True, exist_ok=True)
    write(config, path)
