"""What each choice is worth: trials that differ from a reference in one choice only, compared with it in pairs.

Only such trials show what a choice does, so a space that is searched at random has few of them; presets like
`research-log` consist of them. Both sides predict the same items, so the difference is paired (see
`model.evaluation.bootstrap`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data.atomic import write_file
from data.errors import UserError
from data.formats import format_number, format_value
from model.evaluation.bootstrap import Comparison, compare
from sweep.analysis.confirm import WARM_START_KEYS, objective
from sweep.analysis.predictions import read_predictions
from sweep.analysis.results import short_names
from sweep.analysis.view import Column, TableView
from sweep.config.loader import flat
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.search_checks import SEARCHABLE
from sweep.config.space import FOLD, SEED
from sweep.search.study import StudyStore, TrialRecord, best_first

VERDICTS = {True: "better", False: "worse", None: "tied within noise"}
Changes = dict[str, tuple[object, object]]  # by setting, its value in the reference and in the trial


@dataclass(frozen=True)
class Choice:
    """A trial that differs from the reference in one choice, or in two."""

    changed: Changes
    number: int  # of the trial
    value: float  # of its objective
    comparison: Comparison  # of the trial with the reference
    sweep: str = ""  # of the trial, where it is not that of the reference

    @property
    def trial(self) -> str:
        """Return the trial's number, and its sweep where that is another one."""
        return f"#{self.number} of {self.sweep}" if self.sweep else f"#{self.number}"


def find_reference(config: Config, trials: Sequence[TrialRecord], number: int | None = None) -> TrialRecord | None:
    """Return the trial that others are compared with: the named one, else that of the first point, else the best one.

    Raises:
        UserError: the named trial is not complete.
    """
    done = best_first(config, trials)
    if number is not None:
        for trial in done:
            if trial.number == number:
                return trial
        complete = ", ".join(str(trial.number) for trial in done) or "none"
        raise UserError(f"--reference {number}: no complete trial has this number; complete are {complete}")
    first = config.search.points[0] if config.search.points else None
    return next((trial for trial in done if first is not None and trial.params == first), next(iter(done), None))


def find_choices(study: StudyStore, reference: TrialRecord | None, others: Sequence[StudyStore] = ()) -> list[Choice]:
    """Return the complete trials that differ from the reference in one choice, ordered by axis and value.

    A point that the search asked for may differ in two choices: a second stage starts from another trial and may train
    other parts.

    Args:
        study: of the reference's sweep.
        reference: the trial; None: there are no choices.
        others: sweeps of the same items and objective, whose trials count as well.
    """
    if reference is None:
        return []
    path, choices = trial_folder(study.folder, reference.number), list[Choice]()
    if not (expected := read_predictions(path)):
        return []
    (sums, task), maximize = objective(study.config, path), study.config.search.direction == "maximize"
    for store in (study, *others):
        name, rows = "" if store is study else store.config.name, list[Choice]()
        for trial in best_first(store.config, store.trials()):
            changed, is_point = _changes(study, reference, store, trial), trial.params in store.config.search.points
            if {SEED, FOLD} & changed.keys() or not 1 <= len(changed) <= 1 + is_point:
                continue
            if task in (predictions := read_predictions(trial_folder(store.folder, trial.number))):
                comparison = compare([predictions[task][1]], [expected[task][1]], sums, maximize)
                rows.append(Choice(changed, trial.number, trial.value or 0.0, comparison, name))
        choices += sorted(rows, key=lambda row: _order(study.config, row))
    return choices


def _order(config: Config, choice: Choice) -> tuple[int, list[tuple[int, str]], int]:
    axes = [*config.search.space, *choice.changed]
    values = sorted((axes.index(key), str(after)) for key, (_, after) in choice.changed.items())
    return len(values), values, choice.number


def _changes(study: StudyStore, reference: TrialRecord, store: StudyStore, trial: TrialRecord) -> Changes:
    """Return the choices in which a trial differs from the reference.

    Within a sweep, a choice that excludes other axes counts as one: a text trial has no end-of-audio vector to choose.
    """
    if store is study:
        keys = [key for key in study.config.search.space if key in trial.params and key in reference.params]
        before, after = reference.params, trial.params
    else:
        before = flat(study.trial_config(reference))
        after = flat(store.trial_config(trial))
        keys = [key for key in after if key.startswith(SEARCHABLE)]
    return {key: (before[key], after[key]) for key in keys if before[key] != after[key]}


def choice_name(config: Config, choice: Choice) -> str:
    """Return what was changed: "rank: 8 → 16"."""
    names = short_names(list(dict.fromkeys([*config.search.space, *choice.changed])))
    return ", ".join(
        f"{names[key]}: {_format_choice(key, before)} → {_format_choice(key, after)}"
        for key, (before, after) in choice.changed.items()
    )


def describe_trial(config: Config, trial: TrialRecord) -> str:
    """Return a trial's number and its choices."""
    names = short_names(list(config.search.space))
    chosen = [f"{names[key]} {_format_choice(key, value)}" for key, value in trial.params.items()]
    return f"trial {trial.number}" + (f" ({', '.join(chosen)})" if chosen else "")


def _format_choice(key: str, value: object) -> str:
    """Return the value of a choice; the folder of a former trial as its number and sweep."""
    parts = Path(str(value)).parts if key in WARM_START_KEYS and value else ()
    if len(parts) > 2 and parts[-2] == trial_folder(Path(), 0).parent.name:
        return f"trial {int(parts[-1])} of {parts[-3]}"
    return "none" if value is None else format_value(value)


def ablation_table(config: Config, reference: TrialRecord | None, choices: Sequence[Choice]) -> TableView:
    """Return the table of a paper: the reference, and what each choice adds to its objective."""
    metric = config.search.metric
    names = ("choice", "trial", metric, "difference", "95 % interval", "McNemar p", "verdict")
    rows: list[list[str]] = []
    if reference is not None and reference.value is not None:
        rows.append(["reference", f"#{reference.number}", format_number(reference.value), "", "", "", ""])
    for choice in choices:
        difference, p = choice.comparison.difference, choice.comparison.mcnemar
        has_limits = difference.low is not None and difference.high is not None
        rows.append(
            [
                choice_name(config, choice),
                choice.trial,
                format_number(choice.value),
                f"{difference.value:+.3f}",
                f"[{difference.low:+.3f}, {difference.high:+.3f}]" if has_limits else "",
                "" if p is None else f"{p:.2g}",
                VERDICTS[choice.comparison.better],
            ]
        )
    return TableView([Column(name, is_text=name in ("choice", "verdict")) for name in names], rows)


def write(view: TableView, folder: Path, caption: str) -> list[Path]:
    """Write the table as Markdown, LaTeX and CSV."""
    table = pd.DataFrame(view.rows, columns=view.header)
    escaped = table.rename(columns=_latex_text).map(_latex_text)
    texts = {
        "md": table.to_markdown(index=False, disable_numparse=True),
        "tex": escaped.to_latex(index=False, escape=False, caption=_latex_text(caption), label="tab:ablation"),
        "csv": table.to_csv(index=False),
    }
    paths = []
    for ending, text in texts.items():
        write_file(path := folder / f"ablation.{ending}", f"{text.rstrip()}\n")
        paths.append(path)
    return paths


def _latex_text(text: str) -> str:
    """Escape what LaTeX would read as commands; pandas' own escaping leaves the arrow."""
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("→", "$\\rightarrow$")
