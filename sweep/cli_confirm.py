"""`sweep confirm`: is the best trial the best, and by how much?"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sweep.cli_run import DONE, open_ledger, run_sweep
from sweep.terminal import console

if TYPE_CHECKING:
    from sweep.confirm import Confirmation


def confirm(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    top: Annotated[int, typer.Option(min=1, help="How many of its best configurations.")] = 3,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Trainings of each, under seeds that the search did not have; 5, or 1 with --folds."),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=3, help="Train on each fold of a corpus that has so many, and pool them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")] = False,
) -> None:
    """Train the best again under fresh seeds, compare them in pairs, and read the test split. Goes on after a kill."""
    from sweep import confirm as own

    ledger = open_ledger(folder)
    seeds = seeds or (1 if folds else 5)
    planned, place = own.plan(ledger, folder, top, seeds, folds), own.place_of(folder, folds)
    under = f"{seeds} fresh seed{'s' if seeds > 1 else ''}" + (f" on {folds} folds" if folds else "")
    console.print(f"{len(planned.search.points)} trainings of the best {top} under {under}, in {place.name}")
    code = run_sweep(planned, place)
    if code != DONE:
        sys.exit(code)
    found = own.confirmation(ledger, folder, folds, console.print)
    if as_json:
        print(json.dumps(own.read(folder), indent=1))
        return
    console.print(_table(found))
    for line in found.lines():
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _table(found: "Confirmation") -> Table:
    pooled = f", {found.folds} folds pooled" if found.folds else ""
    table = Table(
        title=f"confirmed by {found.metric}",
        caption=f"means over fresh seeds{pooled}; in brackets 95 % by session and seed",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("trial", "seeds", "in the search", "validation", "test"):
        table.add_column(name, justify="right")
    for place, own in enumerate(found.ranked):
        row = [f"#{own.number}", str(len(own.seeds)), f"{own.searched:.3f}", str(own.val), str(own.test or "")]
        table.add_row(*row, style="bold green" if place == 0 else None)
    return table
