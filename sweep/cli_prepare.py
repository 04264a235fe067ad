"""`sweep prepare`: the commands that turn a corpus into Arrow shards."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from data.schema import Conversation, Corpus

prepare_app = typer.Typer(help="Turn a corpus into Arrow shards.", no_args_is_help=True)
# Into a file or a pipe, tables keep the width of a wide terminal.
console = Console(width=None if sys.stdout.isatty() else 132)

OutOption = Annotated[Path, typer.Option(help="New folder for the shards.")]
SeedOption = Annotated[int, typer.Option(help="Of the split.")]


@prepare_app.command("annomi")
def prepare_annomi(
    csv: Annotated[Path, typer.Option(help="AnnoMI-simple.csv")],
    out: OutOption,
    audio: Annotated[Path | None, typer.Option(help="Folder with <transcript_id>.wav (or .flac, .mp3, …).")] = None,
    seed: SeedOption = 0,
) -> None:
    """AnnoMI-simple; without --audio the corpus is text only."""
    from data.importers.annomi import read_annomi

    _prepare(read_annomi(csv, audio), out, (0.7, 0.15, 0.15), seed)


@prepare_app.command("synthetic")
def prepare_synthetic(
    out: OutOption,
    sessions: Annotated[int, typer.Option(min=3, help="Dialogues to make.")] = 48,
    seed: SeedOption = 0,
) -> None:
    """Synthetic dialogues whose labels hang on words and on pitch."""
    from data import synthetic

    _prepare(synthetic.corpus(sessions=sessions, seed=seed), out, (0.64, 0.18, 0.18), seed)


def _prepare(corpus: "Corpus", out: Path, fractions: tuple[float, float, float], seed: int) -> None:
    from data.prepare import prepare

    def progress(conversations: "list[Conversation]") -> Any:
        return track(conversations, "sessions", console=console, disable=not console.is_terminal)

    shards = prepare(corpus, out, fractions=fractions, seed=seed, track=progress)
    manifest = shards.manifest
    table = Table(title=f"{manifest.corpus} → {out} (fingerprint {manifest.fingerprint})", title_justify="left")
    for name in ("split", "turns", "hours of sound", *manifest.labels):
        table.add_column(name.replace("_", " "), justify="left" if name == "split" else "right")
    for split, turns in manifest.turns.items():
        counts = [str(manifest.label_counts[split][label]) for label in manifest.labels]
        table.add_row(split, str(turns), f"{manifest.hours[split]:.2f}", *counts)
    console.print(table)
    if manifest.findings:
        examples = {finding.code: finding for finding in reversed(corpus.findings)}
        findings = Table(title=f"findings (all of them: {out / 'findings.jsonl'})", title_justify="left")
        for name in ("code", "count", "for example"):
            findings.add_column(name, justify="right" if name == "count" else "left")
        for code, count in manifest.findings.items():
            example = examples[code]
            findings.add_row(code, str(count), escape(f"{example.where}, {example.utterance}: {example.message}"))
        console.print(findings)
