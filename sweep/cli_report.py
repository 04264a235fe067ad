"""`sweep report`: a page about a sweep, also while it runs."""

from pathlib import Path
from typing import Annotated

import typer

from sweep.cli_run import open_ledger
from sweep.terminal import console


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page; `report` within the sweep's by default.")
    ] = None,
    beside: Annotated[list[Path], typer.Option("--with", help="Another sweep to show beside it; repeatable.")] = [],  # noqa: B006
    reference: Annotated[int | None, typer.Option(help="Trial that choices are compared with.")] = None,
) -> None:
    """What is best, by how much, and which choice made the difference: a page, tables for a paper, pictures."""
    from sweep.report import page
    from sweep.report.artifacts import to_mlflow

    ledger = open_ledger(folder)
    others = {other.resolve(): other for other in beside if other.resolve() != folder.resolve()}
    opened = [open_ledger(other) for other in others.values()]
    with console.status("drawing"):
        verdict, written = page.write(ledger, folder, out or folder / "report", opened, reference)
    for line in verdict:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"in MLflow: {to_mlflow(folder, written)}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"page: {written[0]}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"beside it: {', '.join(path.name for path in written[1:])}", soft_wrap=True, highlight=False)
