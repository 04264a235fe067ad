"""`sweep export` and `sweep predict`: a trial as a folder that stands alone, and new sessions that it codes."""

from pathlib import Path
from typing import Annotated

import typer

from data.errors import UserError
from sweep.cli.console import console
from sweep.cli.prepare import make_aligner, make_shards


def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep, or of a trial that was trained alone.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    trial: Annotated[str, typer.Option(help="best, or the number of a trial.")] = "best",
) -> None:
    """Write a trained model as PEFT, safetensors, labels and a model card: it needs only its base models besides."""
    from sweep.export.export import export as write

    with console.status("loading the model"):
        write(folder, trial, out)
    console.print(f"exported: {out}", markup=False, highlight=False, soft_wrap=True)


def predict(
    model: Annotated[Path, typer.Argument(help="Folder that `sweep export` wrote.")],
    sessions: Annotated[Path, typer.Option("--csv", help="The sessions: a file, or a folder where the format is one.")],
    out: Annotated[Path, typer.Option(help="Folder for predictions.csv and transcript.html; it must not exist.")],
    audio: Annotated[Path | None, typer.Option(help="Folder with the recordings; without, text only.")] = None,
    kind: Annotated[str, typer.Option("--format", help="table, annomi, whisperx, daic or mi-tags.")] = "table",
    config: Annotated[Path | None, typer.Option(help="YAML of settings, as of `sweep prepare`: roles …")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key=value: one setting, e.g. columns.text=said.")] = [],  # noqa: B006
) -> None:
    """Code new sessions with an exported model; codes that they have already are not looked at."""
    from data.corpus.config import CorpusConfig
    from data.corpus.issues import BuildError
    from sweep.config.loader import read_tree, validated
    from sweep.export.predict import PAGE, TABLE, predict_sessions

    settings = validated(CorpusConfig, read_tree(config, set_), str(config or "--set"))
    align = make_aligner(settings)
    try:
        with console.status("reading") as status:
            found = predict_sessions(
                model, sessions, audio, kind, settings, out, align=align, run=make_shards, say=status.update
            )
    except BuildError as error:
        raise UserError("; ".join(line.strip() for line in str(error).splitlines()[:2])) from None
    coded = len({coding.row for coding in found if coding.turn and coding.is_coded})
    turns = len({coding.row for coding in found if coding.turn})
    rated = sum(not coding.turn and coding.is_coded for coding in found)
    more = f"; rated {rated} session{'s' if rated > 1 else ''}" if rated else ""
    console.print(f"coded {coded} of {turns} turns; {turns - coded} are listed with the reason{more}", highlight=False)
    for name in (TABLE, PAGE):
        console.print(str(out / name), markup=False, highlight=False, soft_wrap=True)
