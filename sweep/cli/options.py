"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(help="Name of a preset, or a YAML file.")]
SweepArgument = Annotated[Path, typer.Argument(help="Folder of a sweep.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a setting: key=value, dotted; repeatable.")]
TrialsOption = Annotated[
    int | None, typer.Option(min=1, help="Total number of trials; raise it to extend a finished sweep.")
]
OtherBaseOption = Annotated[
    bool,
    typer.Option("--allow-other-base", help="Accept base models that have changed since; results will differ."),
]
OutOption = Annotated[Path | None, typer.Option(help="Folder of the sweep; runs/<name> by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]
