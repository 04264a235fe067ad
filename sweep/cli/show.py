"""Show what several commands share: the parts of a model, the trials of a sweep, the best trial, a preview."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from data.formats import format_value
from sweep.cli.console import console, print_line
from sweep.config.schema import Config

if TYPE_CHECKING:
    from model.speech_llm.speech_llm import SpeechLLM
    from sweep.analysis.view import TableView
    from sweep.config.resolve import ResolvedConfig
    from sweep.preflight.preview import Preview
    from sweep.search.study import TrialRecord


def show_model(resolved: "ResolvedConfig") -> "tuple[SpeechLLM, ResolvedConfig]":
    """Show the parts of the first trial's model, and return that model without its weights, and its configuration."""
    from sweep.analysis.inspection import notes, parts_table
    from sweep.preflight.checks import skeleton
    from sweep.search.candidates import first_trial

    config = first_trial(resolved)
    model = skeleton(config)
    which = ", first trial" if resolved.search.space else ""
    show_table(parts_table(model, config, f"parts of the model{which}"))
    for note in notes(model):
        print_line(note)
    return model, config


def show_trials(config: Config, folder: Path, trials: "Sequence[TrialRecord]") -> None:
    """Show the leaderboard of a search, or the trainings of a sweep that confirms one."""
    from sweep.analysis import confirm
    from sweep.analysis.leaderboard import find_doubts, leaderboard
    from sweep.config.paths import shell_command

    for doubt in find_doubts(config, folder, trials):
        print_line(f"warning: {doubt}")
    search = confirm.search_of(config, folder)
    if search is not None:
        lines = confirm.training_lines(config, folder, search, trials)
    else:
        board = leaderboard(config, folder, trials)
        if dropped := show_table(board.compact()):
            command = shell_command("sweep", "report", folder)
            print_line(f"not shown: {', '.join(dropped)}; widen the terminal or see `{command}`")
        lines = [board.note, *board.ceilings, *board.audit]
        if board.warning:
            lines.append(f"warning: {board.warning}")
        lines += board.reasons
    for line in lines:
        print_line(line)


def show_table(view: "TableView") -> list[str]:
    """Show a table, and return the names of the columns for which the terminal is too narrow."""
    from sweep.analysis.view import to_terminal

    table, dropped = to_terminal(view, console)
    console.print(table)
    return dropped


def print_best(config: Config, folder: Path, best: "TrialRecord", trials: "Sequence[TrialRecord]") -> None:
    """Show the best trial, a cheaper one that is as good, and the commands that reproduce, evaluate and report it."""
    from sweep.analysis.recommendation import recommend, tie_line
    from sweep.analysis.status import train_command
    from sweep.config.paths import shell_command
    from sweep.search.sampling.objectives import front_line

    console.print(f"\nbest: trial {best.number}, {config.search.metric} {best.value:.3f}", style="bold")
    for key, value in best.params.items():
        print_line(f"  {key}: {value}")
    name = program("sweep")
    print_line(f"reproduce:  {train_command(folder, best.params, name)}")
    if line := tie_line(config, trials):
        print_line(line)
    if line := front_line(config, trials):
        print_line(line)
    elif (cheaper := recommend(config, folder, trials)) is not None:
        print_line(cheaper.line)
        print_line(f"reproduce:  {train_command(folder, cheaper.trial.params, name)}")
    print_line(f"evaluate:   {shell_command(name, 'evaluate', folder, '--split', 'test')}")
    print_line(f"confirm:    {shell_command(name, 'confirm', folder)}")
    print_line(f"report:     {shell_command(name, 'report', folder)}")


def print_mlflow(folder: Path) -> None:
    """Show how to open MLflow's UI, and the links to the sweep's trials and charts once it has a run."""
    from sweep.tracking.access import tracking_uri, ui_address, ui_command
    from sweep.tracking.tracker import view_links

    print_line(f"MLflow UI:  {ui_command(folder, program('mlflow'))}")
    address, links = ui_address(tracking_uri(folder)), view_links(folder)
    if address is not None and links is not None:
        print_line(f"trials:     {address}/{links[0]}")
        print_line(f"charts:     {address}/{links[1]}")


def program(name: str) -> str | Path:
    """Return a program of this environment: its name where the shell finds it, or else its path."""
    path = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(path) else path


def preview_table(preview: "Preview") -> RenderableType:
    """Return a preview of `sweep run` for a terminal."""
    table = Table(
        box=None,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for head, lines in _preview_rows(preview):
        for index, line in enumerate(lines):
            table.add_row("" if index else head, escape(line))
    title = Text(f"{preview.config.name}: what would happen in {preview.folder}", style="italic")
    if not preview.refused:
        return Group(title, table)
    refusal = preview.changes.refusal(preview.folder) if preview.changes.refused else preview.refusal
    return Group(title, table, "", f"[red]refused[/red]: {escape(refusal)}")


def _preview_rows(preview: "Preview") -> Iterator[tuple[str, list[str]]]:
    from sweep.search.sampling.samplers import choose
    from sweep.search.sampling.ties import reserved

    changes = [
        f"{change} ({'refused: ' if change.verdict == 'refused' else ''}{change.why})" if change.why else str(change)
        for change in preview.changes.all
    ]
    yield "changed", [*changes, *preview.notes] or ["nothing" if preview.started else "new sweep"]
    yield "done", [f"{count} {state}" for state, count in sorted(preview.ended.items())] or ["no trial"]
    yield "resumes", [f"trial {number} {where}" for number, where in preview.resumed] or ["no trial"]
    first = sum(preview.ended.values()) + len(preview.resumed)
    points = [f"trial {number}: {_format_point(point)}" for number, point in enumerate(preview.points, start=first)]
    drawn = [f"{preview.drawn} drawn by the search"] if preview.drawn else []
    yield "starts", [*points, *drawn] or ["no trial"]
    if preview.drawn:
        yield "sampler", [str(choose(preview.config))]
    if budget := preview.config.search.budget:
        yield "budget", [f"{name}: {limit:g}" for name, limit in budget.limits().items()]
    if kept := reserved(preview.config):
        yield (
            "seeds",
            [f"up to {kept} of {preview.config.search.trials} trials are further seeds of tied configurations"],
        )
    if preview.learns:
        yield "learns", [line.removeprefix("learns ") for line in preview.learns]
    yield "note", preview.search


def _format_point(point: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {format_value(value)}" for key, value in point.items())
