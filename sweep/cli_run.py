"""`sweep run` and `sweep submit`: a sweep on this machine or the cluster that RAY_ADDRESS names, or as a job of one."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from data.errors import UserError, reason
from sweep.cli_show import print_best, program, show_model, show_trials
from sweep.terminal import complain, console

if TYPE_CHECKING:
    from sweep.config import Config
    from sweep.ledger import Ledger
    from sweep.mirror import Mirror

DONE, INFRASTRUCTURE, BAD_INPUT, UNFINISHED = 0, 1, 2, 75
LAST_SECONDS = 15.0  # that MLflow has when the machine is to be taken away; what it lacks then is sent the next time

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
    from sweep.submit import connect, follow, stage, start

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
    from sweep.cluster import ClusterError

    try:
        return work()
    except ClusterError as error:
        complain(error)
        sys.exit(INFRASTRUCTURE)


def _load(config: str, set_: list[str], trials: int | None) -> "Config":
    from sweep import config as configuration

    return configuration.load(config, [*set_, *([f"search.trials={trials}"] if trials is not None else [])])


def _in_package() -> bool:
    """Whether this process was started in what Ray unpacked for a job."""
    return "_ray_pkg_" in str(Path.cwd())


def _leave_package(config: "Config") -> None:
    """Go elsewhere: Ray may unpack the folder anew while the job runs, and a process whose folder is gone has none."""
    from sweep.builtin import absolute

    if _in_package() and absolute(config) == config:
        os.chdir("/")


def _folder(config: "Config", out: Path | None) -> Path:
    folder = out or Path("runs") / config.name
    if _in_package() and not folder.is_absolute():
        raise UserError(f"--out {folder}: within a job it must be an absolute path, on storage that all nodes share")
    return folder


def open_ledger(folder: Path) -> "Ledger":
    """The trials of the sweep in a folder.

    Raises:
        UserError: it is not the folder of a sweep.
    """
    from sweep.ledger import Ledger

    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: not the folder of a sweep (no config.yaml); `sweep run` makes one under runs/")
    return Ledger.of(folder)


def _preview(config: "Config", folder: Path) -> None:
    from sweep.builtin import missing
    from sweep.changes import preview, preview_table

    made = not missing(config)
    found = preview(config, folder, _fingerprint(config) if made else None)
    console.print(preview_table(found))
    if found.refused:
        sys.exit(BAD_INPUT)
    if made and (found.going_on or found.points or found.drawn):
        for line in _before_trials(config, folder):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _fingerprint(config: "Config") -> str:
    from sweep.builtin import resolve
    from sweep.trial import open_shards

    return open_shards(resolve(config).data).fingerprint


def _before_trials(config: "Config", folder: Path) -> "Iterator[str]":
    """What is computed once before the trials start, and the plan, a line each."""
    from sweep.builtin import resolve
    from sweep.frozen import cache_of, described, needs
    from sweep.planner import preview

    resolved, cache = resolve(config), cache_of(config, folder)
    yield from (described(need) for need in needs(resolved, cache))
    yield from preview(resolved, cache, folder)


def run_sweep(config: "Config", folder: Path) -> int:
    """Start a sweep, or go on with it; returns the exit code."""
    from optuna.exceptions import StorageInternalError

    from sweep.cluster import ClusterError
    from sweep.lease import Busy, Lost
    from sweep.mlflow_access import tracking_uri
    from sweep.run import SweepFault
    from sweep.stop import Stop

    server = tracking_uri(folder)
    (stop := Stop()).install()
    try:
        return _hold(config, folder, server, stop)
    except SweepFault as fault:
        complain(f"{fault}; the sweep was stopped, and the same command goes on ({folder})")
        return BAD_INPUT if fault.reason == "bad data" else INFRASTRUCTURE
    except (Busy, Lost, ClusterError) as error:
        complain(error)
        return INFRASTRUCTURE
    except OSError as error:
        complain(f"{folder}: {reason(error)}; mend this, and give the same command again")
        return INFRASTRUCTURE
    except StorageInternalError:
        complain(f"{folder}: the ledger's database went away; the same command goes on")
        return INFRASTRUCTURE
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on where it was ({folder})")
        return UNFINISHED


def _hold(config: "Config", folder: Path, server: str, stop: Any) -> int:
    """Work on a sweep as the one who may; returns the exit code."""
    from sweep.lease import hold
    from sweep.mlflow_access import check_access

    # A new sweep leaves nothing behind if its inputs are no good; one that is there is not looked into for them
    # unless there is something left to do.
    resolved = None if (folder / "config.yaml").exists() else check_inputs(config)
    if resolved:
        check_access(server, config.name)
    with hold(folder, say=console.print) as lease, _mirror(config, folder, stop) as mirror:

        def check() -> None:
            lease.check()
            if mirror:
                mirror.check()

        code = _drive(config, folder, resolved, check, stop)
    return UNFINISHED if code == DONE and mirror and not mirror.complete else code


@contextlib.contextmanager
def _mirror(config: "Config", folder: Path, stop: Any) -> "Iterator[Mirror | None]":
    """Keep the copy of the sweep's folder, if it has one; at the end it is brought up to date."""
    from sweep.mirror import mirrored

    if config.storage.mirror is None:
        yield None
        return
    with mirrored(folder, config.storage.mirror, console.print) as mirror:
        try:
            yield mirror
        finally:
            if not mirror.finish(LAST_SECONDS if stop.asked.is_set() else 600.0):
                console.print(
                    f"[red]the copy lacks some files[/red] ({escape(str(mirror.error))}); give the command again"
                )


def _drive(config: "Config", folder: Path, resolved: "Config | None", check: Callable[[], object], stop: Any) -> int:
    """What the holder of the lease does."""
    from sweep.config import claim_folder
    from sweep.display import Display
    from sweep.leftovers import end_leftovers
    from sweep.run import Driver
    from sweep.tracking import is_shipped, still_has

    claim_folder(config, folder)
    ended = end_leftovers(folder)
    if ended:
        console.print(f"ended {len(ended)} processes that a killed attempt had left")
    driver, shipped = Driver(config, folder, console.print, check, stop), True
    if driver.left() or not is_shipped(folder) or not still_has(config, folder):
        resolved = resolved or check_inputs(config)
        with Display(console, config, folder) as display:
            driver.say = display.say
            shipped = _attempt(driver, resolved)
    return _conclude(driver, shipped)


def check_inputs(config: "Config") -> "Config":
    from sweep.builtin import missing
    from sweep.inputs import resolve_inputs

    new = missing(config)
    if new:
        console.print(f"making {', '.join(new)}: once, then cached")
    with console.status("checking corpus and models"):
        resolved = resolve_inputs(config)
        show_model(resolved)
    return resolved


def _attempt(driver: Any, resolved: "Config") -> bool:
    """Run what is left; whether MLflow took everything."""
    from sweep.mlflow_data import Corpus
    from sweep.tracking import Tracker
    from sweep.trial import open_shards

    say = driver.say
    driver.bind(resolved)
    corpus = Corpus.of(open_shards(resolved.data))
    tracker = Tracker(driver.config, driver.folder, corpus, say=lambda text: say(escape(text)))
    tracker.start()
    try:
        if driver.left():
            say("starting Ray")
            driver.execute(resolved)
    finally:
        say("sending the last results to MLflow")
        shipped = tracker.finish(LAST_SECONDS if driver.stop.asked.is_set() else 120.0)
        if not shipped:
            say(f"[red]MLflow lacks some results[/red] ({escape(str(tracker.error))}); give the same command again")
    return shipped


def _conclude(driver: Any, shipped: bool) -> int:
    """Show what came out and choose the exit code."""
    from sweep import forecast
    from sweep.mlflow_access import ui_command
    from sweep.trainings import search_of

    entries = driver.ledger.entries()
    show_trials(driver.config, driver.folder, entries)
    for line in forecast.lines(driver.config, driver.folder, entries):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if driver.left():
        console.print(f"unfinished: {driver.left()} trials are left; the same command goes on")
        return UNFINISHED
    best = driver.ledger.best()
    if best is None:
        reasons = "; ".join(sorted({entry.why for entry in entries}))
        complain(f"no trial was completed ({reasons})")
        return INFRASTRUCTURE
    if search_of(driver.config, driver.folder) is None:
        print_best(driver.ledger, driver.folder)
    console.print(f"MLflow UI:  {ui_command(driver.folder, program('mlflow'))}", soft_wrap=True, highlight=False)
    return DONE if shipped else UNFINISHED
