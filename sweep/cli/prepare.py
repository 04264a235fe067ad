"""`sweep prepare`: a corpus becomes Arrow shards, with tables and a page about what is in it and what is wrong."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data.errors import UserError
from sweep.cli.console import console

if TYPE_CHECKING:
    from data.corpus.config import CorpusConfig
    from data.corpus.issues import Finding
    from data.corpus.schema import Corpus
    from data.preparation.shard_jobs import Job
    from data.shards.dataset import Shards
    from data.shards.format import ShardFile
    from model.alignment.aligner import CTCAligner

UNFINISHED = 75
WORTH_RAY = 8  # shards: starting Ray takes as long as cutting these, about four hours of sound
REPORT = "report.html"


def prepare(
    kind: Annotated[
        str, typer.Argument(metavar="FORMAT", help="annomi, whisperx, daic, mi-tags, table; synthetic is made here.")
    ],
    source: Annotated[Path | None, typer.Argument(help="The corpus: a file or a folder, by format.")] = None,
    *,
    out: Annotated[
        str, typer.Option(help="Folder or URL (s3://…) for the shards; new sessions are added to an earlier one.")
    ],
    audio: Annotated[Path | None, typer.Option(help="Folder with the recordings; without, text only.")] = None,
    align: Annotated[
        str | None, typer.Option(help="CTC model (Hugging Face id or folder) that refines the turns' times.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML of settings: roles, labels, columns, split …")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key=value: one setting, e.g. split.folds=5.")] = [],  # noqa: B006
) -> None:
    """Turn a corpus into Arrow shards. The same command goes on after a kill, and adds new sessions."""
    from data.corpus.config import CorpusConfig
    from data.corpus.issues import BuildError
    from sweep.config.loader import read_tree, validated

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    aligned = [f"align.model={json.dumps(align)}"] if align is not None else []
    settings = validated(CorpusConfig, read_tree(config, [*set_, *aligned]), str(config or "--set"))
    faults = Path(f"{out.rstrip('/')}.findings.jsonl")
    try:
        shards = _prepare(_read(kind, source, audio, settings), out, settings)
    except BuildError as error:
        _show_faults(error.findings)
        if "://" in out:
            raise
        faults.parent.mkdir(parents=True, exist_ok=True)
        faults.write_text("".join(json.dumps(finding.as_dict()) + "\n" for finding in error.findings), encoding="utf-8")
        raise UserError(f"{error}\nall of them: {faults}") from None
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on where it was ({out})", markup=False)
        sys.exit(UNFINISHED)
    faults.unlink(missing_ok=True)
    show_shards(shards)


def _read(kind: str, source: Path | None, audio: Path | None, settings: "CorpusConfig") -> "Corpus":
    from data.corpus import synthetic
    from data.importers import IMPORTERS

    if kind == "synthetic" and (source is not None or audio is not None):
        raise UserError("prepare synthetic: it is made here and reads no source; leave SOURCE and --audio out")
    if kind == "synthetic":
        return synthetic.corpus(sessions=settings.sessions, seed=settings.split.seed)
    if kind not in IMPORTERS:
        raise UserError(f"prepare {kind}: no such format; use one of {', '.join([*IMPORTERS, 'synthetic'])}")
    if source is None:
        raise UserError(f"prepare {kind}: name the corpus, as in `sweep prepare {kind} SOURCE --out DIR`")
    with console.status(f"reading {source}"):
        return IMPORTERS[kind].read(source, audio, settings)


def _prepare(corpus: "Corpus", out: str, settings: "CorpusConfig") -> "Shards":
    from data.preparation.build import prepare as prepare_corpus
    from data.report.page import corpus_html
    from data.report.summary import read_findings
    from data.shards.store import Store

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("sessions"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("preparing", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"prepared {done} of {total} sessions", highlight=False)

        shards = prepare_corpus(corpus, out, settings, align=make_aligner(settings), run=make_shards, progress=advance)
        progress.update(bar, description="drawing the report")
        Store(out).write(REPORT, corpus_html(shards, read_findings(shards)).encode())
    return shards


def make_aligner(settings: "CorpusConfig") -> "CTCAligner | None":
    if settings.align.model is None:
        return None
    from model.alignment.aligner import CTCAligner

    return CTCAligner(settings.align)


def make_shards(jobs: "Sequence[Job]") -> "Iterator[ShardFile]":
    """Few shards are made here; many through Ray Data, on all CPUs of the machine or the cluster."""
    from data.preparation.shard_jobs import serially

    slow = any(job.align is not None for job in jobs) or "RAY_ADDRESS" in os.environ
    if len(jobs) < (2 if slow else WORTH_RAY):
        yield from serially(jobs)
        return
    from data.loading.ray_source import ray_jobs
    from data.shards.format import ShardFile
    from sweep.execution.cluster import local_or_remote_ray

    with local_or_remote_ray():
        yield from map(ShardFile.from_arrow, ray_jobs([job.to_arrow for job in jobs]))


def show_shards(shards: "Shards") -> None:
    """What is in a prepared corpus: its splits, and its findings by code."""
    from data.report.summary import finding_rows, read_findings, split_rows

    manifest = shards.manifest
    sound = f"{sum(manifest.hours.values()):.2f} h of sound" if any(manifest.hours.values()) else "text only"
    sessions, turns = sum(manifest.sessions.values()), sum(manifest.turns.values())
    head = f"{manifest.corpus}: {sessions} sessions, {turns} turns, {sound} (fingerprint {manifest.fingerprint})"
    console.print(head, soft_wrap=True, highlight=False, markup=False)
    _print_table(*split_rows(shards))
    findings = read_findings(shards)
    if findings:
        console.print(
            f"findings: {len(findings)}, and {manifest.rejected} of {turns} turns are rejected", highlight=False
        )
        _print_table(*finding_rows(findings))
    else:
        console.print("findings: none")
    console.print(f"shards:   {shards.store.place}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"report:   {shards.store / REPORT}", soft_wrap=True, highlight=False, markup=False)


def _show_faults(findings: "Sequence[Finding]") -> None:
    from data.report.summary import finding_rows

    _print_table(*finding_rows(findings))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table()
    for place, name in enumerate(header):
        numbers = all(str(row[place]).replace(".", "").replace(" ", "").rstrip("%").isdigit() for row in rows)
        table.add_column(escape(name), justify="right" if numbers and rows else "left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)
