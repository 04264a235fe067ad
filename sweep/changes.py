"""What changed since a sweep started, and whether it may; and what `sweep run` would do now.

A started sweep takes what leaves its trials comparable: more trials, other resources, a wider space. All else is
refused before anything is written.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from data.errors import UserError
from sweep import config as configuration
from sweep.config import Config
from sweep.settings import flat
from sweep.space import Axis

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
SOURCES = ("data", "model", "sweep")


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


@functools.cache
def code_version() -> str:
    """The version of this project, and a hash over its source files: equal where the code is."""
    content = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for package in SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            content.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    try:
        version = metadata.version("speech-llm-sweep")
    except metadata.PackageNotFoundError:  # run from a working directory that was shipped as it is
        version = "source"
    return f"{version}+{content.hexdigest()[:10]}"


@dataclass(frozen=True)
class Preview:
    """What `sweep run` would do."""

    folder: Path
    config: Config
    started: bool  # whether the folder holds a sweep
    changes: Changes
    notes: list[str] = field(default_factory=list)  # about data and code; of data, refusals too
    refused: bool = False
    going_on: list[tuple[int, str]] = field(default_factory=list)  # number of a trial, and from where
    points: list[dict[str, Any]] = field(default_factory=list)  # that start next
    drawn: int = 0  # trials that are drawn after them
    ended: dict[str, int] = field(default_factory=dict)  # trials by their final state


def preview(config: Config, folder: Path, fingerprint: str | None) -> Preview:
    """What `sweep run` would do in this folder. Takes no lease, writes nothing, starts nothing.

    Args:
        config: the configuration asked for.
        folder: of the sweep; it may not be there yet.
        fingerprint: of the corpus; None where it is not made yet.

    Raises:
        UserError: the ledger's database cannot be used.
    """
    from sweep.ledger import Ledger, has_ledger

    path = folder / "config.yaml"
    if not path.exists():
        return _fresh(config, folder, started=False, changes=Changes(()))
    before = configuration.load(str(path))
    changes = compare(before, config)
    if not has_ledger(folder, before):
        return _fresh(config, folder, started=True, changes=changes)
    try:
        # Where the trials lie is for the sweep to say, and what is left of them for the new settings.
        ledger = Ledger.read(folder, before.model_copy(update={"search": config.search}))
    except UserError:
        if before.storage.ledger is not None:
            raise
        return _fresh(config, folder, started=True, changes=changes)
    known, codes, code = ledger.fingerprint(), ledger.codes(), code_version()
    other_data = known is not None and fingerprint is not None and known != fingerprint
    notes = [f"data: {known} → {fingerprint}: another corpus, which is refused"] if other_data else []
    notes += (
        [f"code: {codes[-1]} → {code}: results may differ from those so far"] if codes[-1:] not in ([], [code]) else []
    )
    entries = ledger.entries()
    new = max(0, config.search.trials - len(entries))
    points = ledger.points_left()[:new]
    return Preview(
        folder,
        config,
        True,
        changes,
        notes,
        other_data or bool(changes.refused),
        [(number, _place(folder, number)) for number in ledger.running()],
        points,
        new - len(points),
        dict(Counter(entry.state for entry in entries if entry.state != "RUNNING")),
    )


def _fresh(config: Config, folder: Path, started: bool, changes: Changes) -> Preview:
    """Of a sweep without a trial."""
    points = config.search.points[: config.search.trials]
    return Preview(
        folder,
        config,
        started,
        changes,
        refused=bool(changes.refused),
        points=list(points),
        drawn=config.search.trials - len(points),
    )


def _place(folder: Path, number: int) -> str:
    """From where a trial goes on, by its newest checkpoint that is whole."""
    from model import checkpoint
    from sweep.ledger import trial_folder

    damaged = ""
    for name in (checkpoint.FILE, checkpoint.PREVIOUS):
        path = trial_folder(folder, number) / name
        if not path.exists():
            continue
        try:
            progress = checkpoint.load(path)["progress"]
            return f"from step {progress['total_steps']}, in epoch {progress['epoch'] + 1}{damaged}"
        except (UserError, KeyError, TypeError, OSError):
            damaged = " (its newest checkpoint is damaged)"
    return f"from its start{damaged}"


def preview_table(found: Preview) -> RenderableType:
    """A preview for a terminal."""
    table = Table(
        box=None, show_header=False, pad_edge=False, title=f"{found.config.name}: what would happen in {found.folder}"
    )
    table.title_justify = "left"
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for head, lines in _rows(found):
        for place, line in enumerate(lines):
            table.add_row("" if place else head, escape(line))
    if not found.refused:
        return table
    refused = found.changes.refusal(found.folder) if found.changes.refused else "another corpus"
    return Group(table, "", f"[red]refused[/red]: {escape(refused)}")


def _rows(found: Preview) -> Iterable[tuple[str, list[str]]]:
    yield "changed", [*map(_told, found.changes.all), *found.notes] or ["nothing" if found.started else "new sweep"]
    yield "done", [f"{count} {state}" for state, count in sorted(found.ended.items())] or ["no trial"]
    yield "goes on", [f"trial {number} {place}" for number, place in found.going_on] or ["no trial"]
    first = sum(found.ended.values()) + len(found.going_on)
    shown = [f"trial {number}: {_point(point)}" for number, point in enumerate(found.points, start=first)]
    drawn = [f"{found.drawn} drawn by the search"] if found.drawn else []
    yield "starts", [*shown, *drawn] or ["no trial"]


def _told(change: Change) -> str:
    verdict = "refused: " if change.verdict == "refused" else ""
    return f"{change} ({verdict}{change.why})" if change.why else str(change)


def _point(point: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in point.items())
