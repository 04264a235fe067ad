"""What each choice is worth: trials that differ from a reference in one choice alone, compared with it in pairs.

Only such trials say what a choice does, so a space that is searched at random has few of them; presets like
`research-log` consist of them. Both sides predict the same items, so the difference is paired (see `model.intervals`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data.atomic import write_file
from data.errors import UserError
from model.evaluation.bootstrap import Comparison, compare
from sweep.analysis.confirm import FORMER, SEED, objective
from sweep.analysis.leaderboard import shown
from sweep.analysis.results import read_predictions, short_names
from sweep.config.loader import flat
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.search_checks import SEARCHABLE
from sweep.config.space import FOLD
from sweep.search.study import StudyStore, TrialRecord, best_first


@dataclass(frozen=True)
class Choice:
    """A trial that differs from the reference in a choice, or in two."""

    changed: dict[str, tuple[Any, Any]]  # by setting, its value in the reference and in the trial
    number: int  # of the trial
    value: float  # of its objective
    comparison: Comparison  # of the trial with the reference
    sweep: str = ""  # that the trial is of, if another one

    @property
    def trial(self) -> str:
        """The trial, for people."""
        return f"#{self.number} of {self.sweep}" if self.sweep else f"#{self.number}"


def reference_of(config: Config, entries: Sequence[TrialRecord], number: int | None = None) -> TrialRecord | None:
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


def choices(study: StudyStore, reference: TrialRecord | None, others: Sequence[StudyStore] = ()) -> list[Choice]:
    """Every complete trial that differs from the reference in one choice, or in two where it was asked for: a second
    stage starts from another trial and may train other parts. By number of choices, axis and value.

    Args:
        ledger: of the reference's sweep.
        reference: the trial; None: there is none, so there are no choices.
        others: of sweeps of the same items and objective, whose trials count as well.
    """
    if reference is None:
        return []
    place, found = trial_folder(study.folder, reference.number), []
    if not (said := read_predictions(place)):
        return []
    (sums, task), maximize = objective(study.config, place), study.config.search.direction == "maximize"
    for own in (study, *others):
        name, rows = "" if own is study else own.config.name, []
        for entry in best_first(own.config, own.trials()):
            changed, asked = _changed(study, reference, own, entry), entry.params in own.config.search.points
            if {SEED, FOLD} & changed.keys() or not 1 <= len(changed) <= 1 + asked:
                continue
            if task in (after := read_predictions(trial_folder(own.folder, entry.number))):
                compared = compare([after[task][1]], [said[task][1]], sums, maximize)
                rows.append(Choice(changed, entry.number, entry.value or 0.0, compared, name))
        found += sorted(rows, key=lambda row: _order(study.config, row))
    return found


def _order(config: Config, choice: Choice) -> tuple[int, list[tuple[int, str]], int]:
    axes = [*config.search.space, *choice.changed]
    values = sorted((axes.index(key), str(after)) for key, (_, after) in choice.changed.items())
    return len(values), values, choice.number


def _changed(
    study: StudyStore, reference: TrialRecord, own: StudyStore, entry: TrialRecord
) -> dict[str, tuple[Any, Any]]:
    """What a trial does otherwise than the reference. Within a sweep, a choice that takes others along counts as one:
    in a text trial there is no end-of-audio vector to choose."""
    if own is study:
        keys = [key for key in study.config.search.space if key in entry.params and key in reference.params]
        before, after = reference.params, entry.params
    else:
        before, after = (flat(whose.trial_config(trial)) for whose, trial in ((study, reference), (own, entry)))
        keys = [key for key in after if key.startswith(SEARCHABLE)]
    return {key: (before[key], after[key]) for key in keys if before[key] != after[key]}


def name_of(config: Config, choice: Choice) -> str:
    """What was chosen in place of what."""
    names = short_names(list(dict.fromkeys([*config.search.space, *choice.changed])))
    changed = choice.changed.items()
    return ", ".join(f"{names[key]}: {_told(key, before)} → {_told(key, after)}" for key, (before, after) in changed)


def described(config: Config, reference: TrialRecord) -> str:
    """A trial and its choices."""
    names = short_names(list(config.search.space))
    chosen = [f"{names[key]} {_told(key, value)}" for key, value in reference.params.items()]
    return f"trial {reference.number}" + (f" ({', '.join(chosen)})" if chosen else "")


def _told(key: str, value: Any) -> str:
    """The value of a choice; a former trial by its number and sweep."""
    parts = Path(value).parts if key in FORMER and value else ()
    if len(parts) > 2 and parts[-2] == trial_folder(Path(), 0).parent.name:
        return f"trial {int(parts[-1])} of {parts[-3]}"
    return "none" if value is None else shown(value)


def frame(config: Config, reference: TrialRecord | None, found: Sequence[Choice]) -> pd.DataFrame:
    """The table of a paper: the reference, and what each choice adds to it or takes away."""
    metric = config.search.metric
    columns = ["choice", "trial", metric, "difference", "95 % interval", "McNemar p", "verdict"]
    rows: list[list[str]] = []
    if reference is not None and reference.value is not None:
        rows.append(["reference", f"#{reference.number}", f"{reference.value:.3f}", "", "", "", ""])
    for own in found:
        low, high, p = own.comparison.difference.low, own.comparison.difference.high, own.comparison.mcnemar
        limits = "" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"
        rows.append(
            [
                name_of(config, own),
                own.trial,
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
