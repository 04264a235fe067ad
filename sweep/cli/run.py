"""`sweep run` and `sweep submit`: a sweep on this machine or the cluster that RAY_ADDRESS names, or as a job of one."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data.errors import UserError
from sweep.cli.console import complain, console
from sweep.cli.show import print_best, program, show_model, show_trials

if TYPE_CHECKING:
    from sweep.config.resolve import ResolvedConfig
    from sweep.config.schema import Config
    from sweep.search.study import StudyStore

DONE, INFRASTRUCTURE, BAD_INPUT, UNFINISHED = 0, 1, 2, 75

SetOption = Annotated[list[str], typer.Option("--set", help="Override a setting: key=value, dotted; repeatable.")]
ConfigArgument = Annotated[str, typer.Argument(help="A preset's name, or a YAML file.")]
TrialsOption = Annotated[int | None, typer.Option(min=1, help="Trials in all; larger than before extends.")]
OutOption = Annotated[Path | None, typer.Option(help="Folder of the sweep; runs/<name> by default.")]


def run(
    config: ConfigArgument,
    set_: SetOption = [],  # noqa: B006 — Typer's way
    trials: TrialsOption = None,
    out: OutOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; start and write nothing.")] = False,
) -> None:
    """Start a sweep, or go on where it was: the same command for both."""
    loaded = _load(config, set_, trials)
    folder = _folder(loaded, out)
    if dry_run:
        _preview(loaded, folder)
        return
    _leave_package(loaded)
    from sweep.runner import run_sweep

    sys.exit(run_sweep(loaded, folder))


def submit(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="Folder of the sweep: an absolute path that all nodes share.")],
    set_: SetOption = [],  # noqa: B006
    trials: TrialsOption = None,
    address: Annotated[str | None, typer.Option(help="Of the job server; else RAY_API_SERVER_ADDRESS.")] = None,
    wait: Annotated[bool, typer.Option(help="Show the job's log until it ends, and end with its exit code.")] = True,
) -> None:
    """Run a sweep as a job of a Ray cluster. Ctrl-C leaves the job alone; the same command goes on with a sweep."""
    from sweep.cli.submit import connect, follow, stage, start

    if not out.is_absolute():
        raise UserError(f"--out {out}: must be an absolute path, on storage that all nodes of the cluster share")
    loaded = _load(config, set_, trials)
    client = _or_exit(lambda: connect(address))
    with tempfile.TemporaryDirectory() as staged:
        stage(loaded, Path(staged))
        job = start(client, loaded, Path(staged), out)
    console.print(f"job {job}; `ray job stop {job}` stops it, with a checkpoint of every trial", soft_wrap=True)
    if not wait:
        return
    try:
        code = follow(client, job, lambda text: console.out(text, end="", highlight=False))
    except KeyboardInterrupt:
        console.print(f"the job goes on; `ray job logs --follow {job}` shows more of it")
        sys.exit(UNFINISHED)
    sys.exit(UNFINISHED if code is None else code)


def _or_exit(work: Callable[[], Any]) -> Any:
    from sweep.execution.cluster import ClusterError

    try:
        return work()
    except ClusterError as error:
        complain(error)
        sys.exit(INFRASTRUCTURE)


def _load(config: str, set_: list[str], trials: int | None) -> "Config":
    from sweep.config.files import load

    return load(config, [*set_, *([f"search.trials={trials}"] if trials is not None else [])])


def _in_package() -> bool:
    """Whether this process was started in what Ray unpacked for a job."""
    return "_ray_pkg_" in str(Path.cwd())


def _leave_package(config: "Config") -> None:
    """Go elsewhere: Ray may unpack the folder anew while the job runs, and a process whose folder is gone has none."""
    from sweep.config.resolve import absolute

    if _in_package() and absolute(config) == config:
        os.chdir("/")


def _folder(config: "Config", out: Path | None) -> Path:
    folder = out or Path("runs") / config.name
    if _in_package() and not folder.is_absolute():
        raise UserError(f"--out {folder}: within a job it must be an absolute path, on storage that all nodes share")
    return folder


def open_study_store(folder: Path) -> "StudyStore":
    """The trials of the sweep in a folder.

    Raises:
        UserError: it is not the folder of a sweep.
    """
    from sweep.search.study import StudyStore

    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: not the folder of a sweep (no config.yaml); `sweep run` makes one under runs/")
    return StudyStore.of(folder)


def _preview(config: "Config", folder: Path) -> None:
    from sweep.cli.show import preview_table
    from sweep.config.resolve import missing, resolve
    from sweep.execution.trial import open_shards
    from sweep.preflight.preview import preview

    resolved = None if missing(config) else resolve(config)  # which would be made
    found = preview(config, folder, open_shards(resolved).fingerprint if resolved else None)
    console.print(preview_table(found))
    if found.refused:
        sys.exit(BAD_INPUT)
    if resolved and (found.going_on or found.points or found.drawn):
        for line in _before_trials(resolved, folder):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _before_trials(config: "ResolvedConfig", folder: Path) -> "Iterator[str]":
    """What is computed once before the trials start, and the plan, a line each."""
    from sweep.preflight.cache_passes import cache_of, described, needs
    from sweep.preflight.dry_run import preview

    cache = cache_of(config, folder)
    yield from (described(need) for need in needs(config, cache))
    yield from preview(config, cache, folder)


def check_inputs(config: "Config") -> "ResolvedConfig":
    from sweep.config.resolve import missing
    from sweep.preflight.checks import resolve_inputs

    new = missing(config)
    if new:
        console.print(f"making {', '.join(new)}: once, then cached")
    with console.status("checking corpus and models"):
        resolved = resolve_inputs(config)
        show_model(resolved)
    return resolved


def _conclude(driver: Any, shipped: bool) -> int:
    """Show what came out and choose the exit code."""
    from sweep.analysis.confirm import search_of
    from sweep.preflight import eta as forecast
    from sweep.tracking.access import ui_command

    entries = driver.study.trials()
    show_trials(driver.config, driver.folder, entries)
    for line in forecast.lines(driver.config, driver.folder, entries):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if driver.left():
        console.print(f"unfinished: {driver.left()} trials are left; the same command goes on")
        return UNFINISHED
    best = driver.study.best()
    if best is None:
        reasons = "; ".join(sorted({entry.why for entry in entries}))
        complain(f"no trial was completed ({reasons})")
        return INFRASTRUCTURE
    if search_of(driver.config, driver.folder) is None:
        print_best(driver.study, driver.folder)
    console.print(f"MLflow UI:  {ui_command(driver.folder, program('mlflow'))}", soft_wrap=True, highlight=False)
    return DONE if shipped else UNFINISHED
