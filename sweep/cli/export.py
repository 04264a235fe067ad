"""`sweep export` and `sweep predict`: write a trained model as a folder, and code new sessions with it."""

from pathlib import Path
from typing import Annotated

import typer

from data.errors import UserError
from sweep.cli.console import console, print_line
from sweep.cli.options import OtherBaseOption
from sweep.cli.prepare import load_corpus_settings, make_aligner, make_shards


def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep, or of a trial that `sweep train` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    trial: Annotated[str, typer.Option(help="best, or a trial number.")] = "best",
    merged: Annotated[
        bool, typer.Option("--merged", help="Write all weights, LoRA merged into the LLM, for plain transformers.")
    ] = False,
    allow_other_base: OtherBaseOption = False,
) -> None:
    """Write a trained model: LoRA for PEFT, other weights as safetensors, labels and a model card.

    Only its base models are needed to load it, and nothing with --merged.
    """
    from sweep.export.export import export as write

    with console.status("loading the model"):
        write(folder, trial, out, allow_other_base, merged)
    print_line(f"exported: {out}")


def predict(
    model: Annotated[Path, typer.Argument(help="Folder that `sweep export` wrote.")],
    sessions: Annotated[Path, typer.Option("--csv", help="The sessions: a file or a folder, depending on the format.")],
    out: Annotated[Path, typer.Option(help="Folder to create for predictions.csv and transcript.html.")],
    audio: Annotated[Path | None, typer.Option(help="Folder of the recordings; without it, text only.")] = None,
    kind: Annotated[
        str | None, typer.Option("--format", help="See `sweep formats`. Left out: guessed from the sessions.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, as for `sweep prepare`.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Override a setting: key=value; repeatable.")] = [],  # noqa: B006
    allow_other_base: OtherBaseOption = False,
) -> None:
    """Code new sessions with an exported model; codes that they have already are ignored."""
    from data.corpus.issues import BuildError
    from sweep.export.predict import PAGE, TABLE, predict_sessions

    settings = load_corpus_settings(config, set_)
    align = make_aligner(settings)
    try:
        with console.status("reading") as status:
            codings = predict_sessions(
                model,
                sessions,
                audio,
                kind,
                settings,
                out,
                align=align,
                run=make_shards,
                say=status.update,
                allow_other_base=allow_other_base,
            )
    except BuildError as error:
        raise UserError("; ".join(line.strip() for line in str(error).splitlines()[:2])) from None
    turns = {coding.row for coding in codings if coding.turn}
    coded = {coding.row for coding in codings if coding.turn and coding.is_coded}
    rated = sum(not coding.turn and coding.is_coded for coding in codings)
    ratings = f"; rated {rated} session{'s' if rated > 1 else ''}" if rated else ""
    print_line(
        f"coded {len(coded)} of {len(turns)} turns; {len(turns) - len(coded)} are listed with the reason{ratings}"
    )
    for name in (TABLE, PAGE):
        print_line(out / name)
