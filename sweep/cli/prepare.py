"""`sweep prepare`: write a corpus as Arrow shards, with tables and a page about its content and its findings."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data.errors import UserError
from sweep.cli.console import console, print_line
from sweep.execution.signals import ExitCode

if TYPE_CHECKING:
    from data.corpus.codebook import Codebook
    from data.corpus.config import CorpusConfig
    from data.corpus.schema import Corpus
    from data.preparation.shard_jobs import ShardJob
    from data.report.card import CorpusSource
    from data.shards.dataset import Shards
    from data.shards.format import ShardFile
    from model.alignment.aligner import CTCAligner

WORTH_RAY = 8  # shards, about four hours of audio: writing fewer takes less time than starting Ray
REPORT = "report.html"


def prepare(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="[FORMAT]",
            help="See `sweep formats`; or synthetic, made here. Left out: guessed from SOURCE.",
        ),
    ],
    source: Annotated[Path | None, typer.Argument(help="A file or a folder, depending on the format.")] = None,
    *,
    out: Annotated[
        str, typer.Option(help="Folder or URL (s3://…) of the shards; new sessions are added to an existing corpus.")
    ],
    audio: Annotated[Path | None, typer.Option(help="Folder of the recordings; without it, text only.")] = None,
    align: Annotated[
        str | None, typer.Option(help="CTC model (Hugging Face id or folder) that refines the times of the turns.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings: roles, labels, columns, split …")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Override a setting, e.g. split.folds=5; repeatable.")] = [],  # noqa: B006
) -> None:
    """Write a corpus as Arrow shards.

    Rerun the same command to resume it, or to add new sessions.
    """
    from data.corpus.issues import BuildError
    from data.report.card import CARD
    from data.report.summary import finding_rows

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    aligned = [f"align.model={json.dumps(align)}"] if align is not None else []
    settings = load_corpus_settings(config, [*set_, *aligned])
    faults = Path(f"{out.rstrip('/')}.findings.jsonl")
    try:
        corpus, origin = _read_corpus(kind, source, audio, settings)
        shards = _write_shards(corpus, origin, out, settings)
    except BuildError as error:
        _print_table(*finding_rows(error.findings))
        if "://" in out:
            raise
        faults.parent.mkdir(parents=True, exist_ok=True)
        faults.write_text("".join(json.dumps(finding.as_dict()) + "\n" for finding in error.findings), encoding="utf-8")
        raise UserError(f"{error}\nall of them: {faults}") from None
    except KeyboardInterrupt:
        print_line(f"stopped; rerun the same command to resume ({out})")
        sys.exit(ExitCode.UNFINISHED)
    faults.unlink(missing_ok=True)
    show_shards(shards)
    print_line(f"card:     {shards.store / CARD}")


def load_corpus_settings(config: Path | None, overrides: Sequence[str]) -> "CorpusConfig":
    """Return the settings of a preparation, with the content of the codebook that they name.

    Raises:
        ConfigError: lists every problem of the settings, or of the codebook.
    """
    from data.corpus.config import CorpusConfig
    from sweep.config.loader import apply_overrides, read_tree, validate

    tree = apply_overrides({} if config is None else read_tree(config), overrides)
    if tree.get("codebook") is not None:
        tree["codebook"] = _load_codebook(tree["codebook"], str(config or "--set"))
    return validate(CorpusConfig, tree, str(config or "--set"))


def _load_codebook(value: object, source: str) -> "Codebook":
    """Return a codebook by the name of a shipped one, by its file, or by its content."""
    from data.corpus.codebook import Codebook, shipped
    from sweep.config.loader import problems_error, read_tree, validate

    if isinstance(value, dict):
        tree, source = value, f"{source}: codebook"
    elif value in (books := shipped()):
        tree, source = read_tree(Path(str(books[str(value)]))), str(value)
    elif isinstance(value, str) and Path(value).is_file():
        tree, source = read_tree(Path(value)), value
    else:
        near = get_close_matches(str(value), books, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"codebook: {value!r}: no codebook of this name, and no file; {hint}shipped are {', '.join(books)}"
        )
    book = validate(Codebook, tree, source)
    if problems := book.problems():
        raise problems_error(source, problems)
    return book


def codebooks(
    name: Annotated[str | None, typer.Argument(help="A shipped codebook or a YAML file, to check and show it.")] = None,
) -> None:
    """List the codebooks, or show the codes of one and the classes of its levels."""
    from data.corpus.codebook import NAMES, shipped

    if name is None:
        for known in shipped():
            book = _load_codebook(known, known)
            roles = ", ".join(f"{len(codes)} codes of the {role}" for role, codes in book.codes.items())
            print_line(f"{known:<12}{book.name}: {roles}; levels {', '.join([NAMES, *book.levels])}")
        print_line("use one:    sweep prepare SOURCE --out corpus --set codebook=NAME")
        return
    book = _load_codebook(name, name)
    print_line(f"{book.name}: {book.source or 'no source is named'}")
    merges = [book.merge(level) for level in book.levels]
    _print_table(
        ["role", "code", "name", "also", *book.levels],
        [
            [role, code, entry.name, ", ".join(entry.also)]
            + [merge.class_of.get((role, label), "") for merge in merges]
            for role, codes in book.codes.items()
            for label, (code, entry) in zip(book.labels[role], codes.items(), strict=True)
        ],
    )
    for kind, marks in book.modifiers.items():
        print_line(f"left out after a code: {kind} ({', '.join(marks)})")
    print_line(f"choose a level of a sweep with --set data.codes=NAME: {', '.join([NAMES, *book.levels])}")


def _read_corpus(
    kind: str, source: Path | None, audio: Path | None, settings: "CorpusConfig"
) -> "tuple[Corpus, CorpusSource]":
    """Return the corpus, and what its card says about its source."""
    from data.corpus import synthetic
    from data.importers import IMPORTERS, guess_format
    from data.report.card import CorpusSource
    from sweep.config.version import code_version

    if kind == "synthetic":
        if source is not None or audio is not None:
            raise UserError("prepare synthetic: this corpus is made here; leave SOURCE and --audio out")
        corpus = synthetic.corpus(sessions=settings.sessions, seed=settings.split.seed)
        return corpus, CorpusSource(kind, None, None, code=code_version())
    if kind not in IMPORTERS and source is None and Path(kind).exists():
        source = Path(kind)
        kind = guess_format(source)
        print_line(f"format:   {kind} ({IMPORTERS[kind].description}) guessed; name it to choose another one")
    if kind not in IMPORTERS:
        raise UserError(f"prepare {kind}: no such format; use one of {', '.join([*IMPORTERS, 'synthetic'])}")
    if source is None:
        raise UserError(f"prepare {kind}: name the corpus, as in `sweep prepare {kind} SOURCE --out DIR`")
    with console.status(f"reading {source}"):
        corpus = IMPORTERS[kind].read(source, audio, settings)
        return corpus, CorpusSource.of(kind, source, audio, corpus, code_version())


def formats() -> None:
    """List the formats that `sweep prepare` reads, each with an example."""
    from data.importers import IMPORTERS

    width = max(map(len, [*IMPORTERS, "synthetic"])) + 2
    for name, known in IMPORTERS.items():
        print_line(f"{name:<{width}}{known.description}")
        print_line(f"{'':<{width}}sweep prepare {name} {known.example} --out corpus")
    print_line(f"{'synthetic':<{width}}Dialogues made here, for a first try.")
    print_line(f"{'':<{width}}sweep prepare synthetic --out corpus")


def _write_shards(corpus: "Corpus", origin: "CorpusSource", out: str, settings: "CorpusConfig") -> "Shards":
    """Write the shards, the report and the card, with a progress bar on a terminal and lines elsewhere."""
    from data.preparation.build import prepare as prepare_corpus
    from data.report.card import CARD, corpus_card
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
                print_line(f"prepared {done} of {total} sessions")

        shards = prepare_corpus(corpus, out, settings, align=make_aligner(settings), run=make_shards, progress=advance)
        progress.update(bar, description="drawing the report")
        findings = read_findings(shards)
        Store(out).write(REPORT, corpus_html(shards, findings).encode())
        Store(out).write(CARD, corpus_card(shards, findings, origin).encode())
    return shards


def make_aligner(settings: "CorpusConfig") -> "CTCAligner | None":
    """Return the aligner that the settings name, if they name one."""
    if settings.align.model is None:
        return None
    from model.alignment.aligner import CTCAligner

    return CTCAligner(settings.align)


def make_shards(jobs: "Sequence[ShardJob]") -> "Iterator[ShardFile]":
    """Write a few shards in this process, and many with Ray Data on all CPUs of the machine or the cluster."""
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
    """Show what a prepared corpus holds: its splits, and its findings by code."""
    from data.report.summary import finding_rows, read_findings, split_rows

    manifest = shards.manifest
    audio = f"{sum(manifest.hours.values()):.2f} h of audio" if any(manifest.hours.values()) else "text only"
    sessions, turns = sum(manifest.sessions.values()), sum(manifest.turns.values())
    print_line(f"{manifest.corpus}: {sessions} sessions, {turns} turns, {audio} (fingerprint {manifest.fingerprint})")
    _print_table(*split_rows(shards))
    findings = read_findings(shards)
    if findings:
        print_line(f"findings: {len(findings)}; {manifest.rejected} of {turns} turns are rejected")
        _print_table(*finding_rows(findings))
    else:
        print_line("findings: none")
    print_line(f"shards:   {shards.store.address}")
    print_line(f"report:   {shards.store / REPORT}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, with columns of numbers aligned to the right."""
    table = Table()
    for column, name in enumerate(header):
        numeric = all(str(row[column]).replace(".", "").replace(" ", "").rstrip("%").isdigit() for row in rows)
        table.add_column(escape(name), justify="right" if numeric and rows else "left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)
