"""What several commands show: the parts of a model, the trials of a sweep, the best of them."""

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from sweep.cli.console import console
from sweep.config.diff import Change
from sweep.config.schema import Config
from sweep.preflight.preview import Preview

if TYPE_CHECKING:
    from model.speech_llm.speech_llm import SpeechLLM
    from sweep.config.resolve import ResolvedConfig
    from sweep.config.schema import Config
    from sweep.search.study import StudyStore, TrialRecord


def show_model(resolved: "ResolvedConfig") -> "tuple[SpeechLLM, ResolvedConfig]":
    """The parts of the model, of a search's first trial; that model without its weights, and its configuration."""
    from sweep.analysis.inspection import notes, parts_table
    from sweep.preflight.checks import skeleton
    from sweep.search.candidates import first_trial

    config = first_trial(resolved)
    model = skeleton(config)
    which = ", first trial" if resolved.search.space else ""
    console.print(parts_table(model, config, f"parts of the model{which}"))
    for note in notes(model):
        console.print(note, markup=False, highlight=False)
    return model, config


def show_trials(config: "Config", folder: Path, entries: "Sequence[TrialRecord]") -> None:
    """The leaderboard of a search; of trainings that confirm one, what each of them is."""
    from sweep.analysis import confirm as trainings
    from sweep.analysis import leaderboard

    search = trainings.search_of(config, folder)
    if search is None:
        console.print(leaderboard.table(config, folder, entries))
        told = leaderboard.notes(entries)
    else:
        told = trainings.lines(config, folder, search, entries)
    for line in told:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def print_best(study: "StudyStore", folder: Path) -> None:
    from sweep.analysis.status import train_command
    from sweep.config.paths import near

    best = study.best()
    assert best is not None
    console.print(f"\nbest: trial {best.number}, {study.config.search.metric} {best.value:.3f}", style="bold")
    for key, value in best.params.items():
        console.print(f"  {key}: {value}", highlight=False)
    where = near(folder)
    again = f"{program('sweep')} {train_command(folder, best.params)}"
    console.print(f"again:      {again}", soft_wrap=True, highlight=False)
    console.print(f"on test:    {program('sweep')} evaluate {where} --split test", soft_wrap=True, highlight=False)
    console.print(f"is it best? {program('sweep')} confirm {where}", soft_wrap=True, highlight=False)
    console.print(f"a page:     {program('sweep')} report {where}", soft_wrap=True, highlight=False)


def program(name: str) -> str:
    """How a program of this environment is called from here."""
    from sweep.config.paths import near

    path = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(path) else str(near(path))


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
