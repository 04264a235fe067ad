"""What each choice is worth: trials that differ from a reference in one choice alone, compared with it in pairs.

Only such trials say what a choice does, so a space that is searched at random has few of them; presets like
`research-log` consist of them. Both sides predict the same items, so the difference is paired (see `model.intervals`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data.errors import UserError
from model.intervals import Comparison, compare
from sweep.config import Config
from sweep.confirm import SEED, objective
from sweep.leaderboard import shown
from sweep.ledger import Entry, best_first, trial_folder
from sweep.results import read_predictions, short_names
from sweep.whole import write_file


@dataclass(frozen=True)
class Choice:
    """A trial that differs from the reference in one choice."""

    key: str  # of the setting
    before: Any  # its value in the reference
    after: Any
    number: int  # of the trial
    value: float  # of its objective
    comparison: Comparison  # of the trial with the reference


def reference_of(config: Config, entries: Sequence[Entry], number: int | None = None) -> Entry | None:
    """The trial that others are compared with: the one that is named, else that of the first point, else the best.

    Raises:
        UserError: the one that is named is not complete.
    """
    done = best_first(config, entries)
    if number is not None:
        found = next((entry for entry in done if entry.number == number), None)
        if found is None:
            known = ", ".join(str(entry.number) for entry in done) or "none"
            raise UserError(f"--reference {number}: no complete trial has this number; complete are {known}")
        return found
    first = config.search.points[0] if config.search.points else None
    return next((entry for entry in done if first is not None and entry.params == first), next(iter(done), None))


def choices(config: Config, folder: Path, entries: Sequence[Entry], reference: Entry | None) -> list[Choice]:
    """Every complete trial that differs from the reference in one choice, by axis and value.

    A choice that takes others along counts as one: in a text trial there is no end-of-audio vector to choose.
    """
    if reference is None:
        return []
    said, found = trial_folder(folder, reference.number), []
    if not read_predictions(said):
        return []
    sums, task = objective(config, said)
    before = read_predictions(said)[task][1]
    for entry in best_first(config, entries):
        differing = [key for key in config.search.space if _differs(entry, reference, key)]
        own = read_predictions(trial_folder(folder, entry.number))
        if len(differing) != 1 or task not in own or differing == [SEED]:
            continue
        compared = compare([own[task][1]], [before], sums, config.search.direction == "maximize")
        assert entry.value is not None
        [key] = differing
        found.append(Choice(key, reference.params[key], entry.params[key], entry.number, entry.value, compared))
    order = list(config.search.space)
    return sorted(found, key=lambda choice: (order.index(choice.key), str(choice.after), choice.number))


def _differs(entry: Entry, reference: Entry, key: str) -> bool:
    """Whether both trials have the choice, and made it differently."""
    both = key in entry.params and key in reference.params
    return both and entry.params[key] != reference.params[key]


def name_of(config: Config, choice: Choice) -> str:
    """What was chosen in place of what."""
    return f"{short_names(list(config.search.space))[choice.key]}: {shown(choice.before)} → {shown(choice.after)}"


def frame(config: Config, reference: Entry | None, found: Sequence[Choice]) -> pd.DataFrame:
    """The table of a paper: the reference, and what each choice adds to it or takes away."""
    metric = config.search.metric
    columns = ["choice", "trial", metric, "difference", "95 % interval", "McNemar p", "verdict"]
    rows: list[list[str]] = []
    if reference is not None and reference.value is not None:
        rows.append(["reference", str(reference.number), f"{reference.value:.3f}", "", "", "", ""])
    for own in found:
        low, high, p = own.comparison.difference.low, own.comparison.difference.high, own.comparison.mcnemar
        limits = "" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"
        rows.append(
            [
                name_of(config, own),
                str(own.number),
                f"{own.value:.3f}",
                f"{own.comparison.difference.value:+.3f}",
                limits,
                "" if p is None else f"{p:.2g}",
                {True: "better", False: "worse", None: "tied within noise"}[own.comparison.better],
            ]
        )
    return pd.DataFrame(rows, columns=columns)


def write(table: pd.DataFrame, folder: Path, caption: str) -> list[Path]:
    """The table as Markdown, LaTeX and CSV."""
    paths = [folder / f"ablation.{ending}" for ending in ("md", "tex", "csv")]
    texts = [table.to_markdown(index=False, disable_numparse=True), _latex(table, caption), table.to_csv(index=False)]
    for path, text in zip(paths, texts, strict=True):
        write_file(path, f"{text.rstrip()}\n")
    return paths


def _latex(table: pd.DataFrame, caption: str) -> str:
    shown = table.rename(columns=_escaped).map(_escaped)
    text: str = shown.to_latex(index=False, escape=False, caption=_escaped(caption), label="tab:ablation")
    return text


def _escaped(text: str) -> str:
    """What LaTeX would read as commands; pandas' own escaping leaves the arrow."""
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("→", "$\\rightarrow$")
