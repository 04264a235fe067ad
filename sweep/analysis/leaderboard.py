"""The leaderboard: trials by the objective with its 95 % interval, what they cost, and why each ended as it did."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from data.atomic import write_file
from data.formats import format_duration
from model.evaluation.bootstrap import Interval, interval, sums_of
from model.evaluation.metrics import Record
from sweep.analysis.results import progress, ranked, read_predictions, short_names
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.version import code_version
from sweep.search import pruning_audit
from sweep.search.cost import format_device_hours
from sweep.search.study import TrialRecord

KEPT = "intervals.json"  # beside the predictions that they are of
SHOWN = ("macro_f1", "accuracy", "bleu", "rouge_l", "perplexity")  # beside the objective, where a task has them
HEALTH = ("eos_rate", "run_on", "empty")  # of generated texts
Said = Mapping[str, tuple[list[str], list[Record]]]
MEASURED = (*SHOWN, "weighted_f1", "loss", "ece", *HEALTH)


class Kept(BaseModel):
    """Intervals, and what they are of: the time of the predictions, and the code that counted."""

    of: tuple[int, str]
    intervals: dict[str, Interval | None] = {}


@dataclass(frozen=True)
class Board:
    """Rows of text, best trial first."""

    header: list[str]
    rows: list[list[str]]


def board(config: Config, folder: Path, entries: Sequence[TrialRecord], whole: bool = False) -> Board:
    """The leaderboard of a sweep.

    Args:
        config: of the sweep.
        folder: of the sweep; predictions are read there, for intervals.
        entries: of its ledger.
        whole: all metrics, overall and per role, and the cost of each trial, beside what fits a terminal.
    """
    names, metric = short_names(list(config.search.space)), config.search.metric
    known = {name for entry in entries for name in entry.metrics}
    subsets = sorted(name for name in known if _is_subset(name, known))
    roles = sorted(name for name in known if name.startswith(("accuracy_", "macro_f1_")) and name not in subsets)
    measured = MEASURED if whole else [name for name in SHOWN if not (subsets and name == "accuracy")]
    others = [name for name in measured if name != metric and name in known]
    others += roles if whole else []
    cost = ["epochs", "steps", "time", "cost"] if whole else []
    header = ["#", "state", metric, *others, *(key.removeprefix("accuracy_") for key in subsets), *cost]
    rows = []
    for entry in ranked(config, entries):
        row = [str(entry.number), _state(config, entry, whole), _with_interval(folder, entry, metric, entry.value, 3)]
        row += [_number(entry.metrics.get(name)) for name in others]
        row += [_with_interval(folder, entry, name, entry.metrics.get(name), 2) for name in subsets]
        row += _cost(config, entry) if whole else []
        rows.append([*row, *(shown(entry.params.get(key, "")) for key in names), *([entry.why] if whole else [])])
    return Board([*header, *names.values(), *(["why"] if whole else [])], rows)


def _is_subset(name: str, known: set[str]) -> bool:
    """Whether it is the accuracy on a named subset, not that of a role."""
    return name.startswith("accuracy_") and f"macro_f1_{name.removeprefix('accuracy_')}" not in known


def _state(config: Config, entry: TrialRecord, whole: bool) -> str:
    if entry.state == "COMPLETE" or whole:
        return entry.state
    return f"{entry.state} {len(entry.curve)}/{config.train.epochs}"


def _cost(config: Config, entry: TrialRecord) -> list[str]:
    seconds = float(entry.metrics.get("seconds", 0.0))
    return [str(len(entry.curve)), str(entry.steps), format_duration(seconds), format_device_hours(config, seconds)]


def interval_of(folder: Path, entry: TrialRecord, name: str) -> Interval | None:
    """That of a trial's metric on the validation split, from its last predictions; None where there is none.

    It is kept beside them, where that can be written: hundreds of trials would take a while each time.
    """
    path = trial_folder(folder.absolute(), entry.number) / "predictions.json"
    # A running trial's predictions may be of a later epoch than its last report.
    if entry.state == "RUNNING" or not path.exists():
        return None
    changed = path.stat().st_mtime_ns
    kept, now = path.with_name(KEPT), Kept(of=(changed, code_version()))
    with contextlib.suppress(OSError, ValueError):
        known = Kept.model_validate_json(kept.read_bytes())
        now = known if known.of == now.of else now
    if name not in now.intervals:
        now.intervals[name] = _interval(path.parent, changed, name)
        with contextlib.suppress(OSError):
            write_file(kept, now.model_dump_json())
    return now.intervals[name]


@functools.lru_cache(maxsize=4096)
def _interval(folder: Path, _: int, name: str) -> Interval | None:
    return said_interval(read_predictions(folder), name, {})


def said_interval(said: Said, name: str, roles: Mapping[str, Sequence[str]]) -> Interval | None:
    """That of a metric by its name in `summarise`, the task included; None where there is none.

    Args:
        said: by task, its labels and what was predicted.
        name: of the metric.
        roles: who may carry which label; only the F1 of a role asks for it.
    """
    task, _slash, metric = name.rpartition("/")
    labels, records = said.get(task or next(iter(said), ""), ([], []))
    sums = sums_of(metric, labels, roles)
    return interval([records], sums) if sums and records else None


def _with_interval(folder: Path, entry: TrialRecord, name: str, value: float | None, digits: int) -> str:
    if value is None:
        return ""
    found = interval_of(folder, entry, name)
    # Of an epoch whose report was lost, predictions may be there and the ledger not know them: no limits then.
    if found is None or found.low is None or abs(found.value - value) > 1e-6:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{found.low:.2f},{found.high:.2f}]"


def table(config: Config, folder: Path, entries: Sequence[TrialRecord]) -> Table:
    """For a terminal."""
    found = board(config, folder, entries)
    inside = any("[" in cell for row in found.rows for cell in row)
    note = "validation split, after the last epoch" + ("; in brackets 95 % by session" if inside else "")
    note += f"; {progress(config, entries).hours_text()} used"
    warning = pruning_audit.format_warning(config, entries)
    note = "\n".join([note, *pruning_audit.format_lines(config, entries)])
    note += f"\n[bold yellow]{warning}[/]" if warning else ""
    drawn = Table(
        title=f"{config.name}: trials by {config.search.metric}",
        caption=note,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in found.header:
        justify: Literal["left", "right"] = "left" if name == "state" else "right"
        drawn.add_column(name.replace("_", "\n"), justify=justify, no_wrap=True)
    for place, row in enumerate(found.rows):
        drawn.add_row(*map(escape, row), style="bold green" if place == 0 and row[1] == "COMPLETE" else None)
    return drawn


def notes(entries: Sequence[TrialRecord]) -> list[str]:
    """A line for each trial that did not simply train to its end."""
    told = [entry for entry in entries if entry.state in ("PRUNED", "FAIL") or entry.exempted_at is not None]
    return [f"#{entry.number} {entry.why}" for entry in told]


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else ""


def shown(value: Any) -> str:
    """The value of a choice, for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value == 0 or abs(value) >= 0.01 else f"{value:.2e}"
