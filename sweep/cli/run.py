"""`sweep run`: start, resume or extend a sweep on this machine or on the cluster that RAY_ADDRESS names."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.errors import UserError, reason
from sweep.cli.console import complain, console, print_line
from sweep.cli.options import ConfigArgument, OtherBaseOption, OutOption, SetOption, TrialsOption
from sweep.cli.show import preview_table, print_best, print_mlflow, show_trials
from sweep.config.schema import Config
from sweep.execution.signals import ExitCode, StopRequest, exit_line

if TYPE_CHECKING:
    from sweep.runner import Outcome


def run(
    config: ConfigArgument,
    set_: SetOption = [],  # noqa: B006 — Typer requires the default
    trials: TrialsOption = None,
    out: OutOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would happen; start nothing and write nothing.")
    ] = False,
    allow_other_base: OtherBaseOption = False,
) -> None:
    """Start, resume or extend a sweep; the command is the same."""
    loaded = load_config(config, set_, trials)
    folder = out or Path("runs") / loaded.name
    if _in_ray_package() and not folder.is_absolute():
        raise UserError(f"--out {folder}: within a job it must be an absolute path, on storage that all nodes share")
    if dry_run:
        _preview(loaded, folder, allow_other_base)
        return
    if not (folder / "config.yaml").exists():  # an existing sweep may have nothing left to do
        from sweep.search.base_models import check_bases

        check_bases(loaded)  # before torch, Ray and MLflow are imported
    _leave_ray_package(loaded)
    sys.exit(run_and_show(loaded, folder, allow_other_base))


def load_config(config: str, set_: list[str], trials: int | None) -> Config:
    """Read the configuration of a sweep with the options of the command line."""
    from sweep.config.files import load

    return load(config, [*set_, *([f"search.trials={trials}"] if trials is not None else [])])


def run_and_show(config: Config, folder: Path, allow_other_base: bool = False) -> int:
    """Run a sweep, show how it ended, and return the exit code."""
    from sweep.cli.progress import ConsoleListener
    from sweep.execution.cluster import RayStart

    killed = "unfinished: the run was ended at once (killed, out of memory, or by a second Ctrl-C)"
    with exit_line(f"{killed}; rerun the same command to resume ({folder})"):
        (stop := StopRequest(exits=True)).install()  # to the end of the process
        listener = ConsoleListener()
        with RayStart(listener.warn) as ray_start:
            if not (folder / "config.yaml").exists():  # Ray starts while torch is imported and the inputs are checked
                ray_start.begin(config, config.search.trials)
            from sweep.runner import run as run_sweep

            outcome = run_sweep(config, folder, listener, stop, allow_other_base=allow_other_base, ray_start=ray_start)
        try:
            if outcome.trials:
                _show_trials(outcome)
        except KeyboardInterrupt:
            print_line(f"stopped; rerun the same command to see the results ({folder})")
            return ExitCode.UNFINISHED
        except Exception as error:  # the sweep has ended all the same, and the last line says how
            complain(f"the results cannot be shown ({type(error).__name__}: {reason(error)}); try `sweep status`")
        if outcome.state == "failed":
            complain(outcome.message)
        else:
            print_line(outcome.message)
        return outcome.exit_code


def _show_trials(outcome: "Outcome") -> None:
    """Show the leaderboard, the best trial of a search, and how to look at the results."""
    from sweep.analysis.confirm import search_of
    from sweep.preflight.plan_file import plan_lines

    config, folder, trials = outcome.config, outcome.folder, outcome.trials
    show_trials(config, folder, trials)
    for line in plan_lines(config, folder, trials):
        print_line(line)
    if outcome.best is None or outcome.trials_left:
        return
    if search_of(config, folder) is None:
        print_best(config, folder, outcome.best, trials)
    print_mlflow(folder)


def _in_ray_package() -> bool:
    """Return whether this process was started in the folder that Ray unpacked for a job."""
    return "_ray_pkg_" in str(Path.cwd())


def _leave_ray_package(config: Config) -> None:
    """Change to another folder: Ray may unpack its folder again while the job runs, which would remove this one."""
    from sweep.config.resolve import absolute

    if _in_ray_package() and absolute(config) == config:
        os.chdir("/")


def _preview(config: Config, folder: Path, allow_other_base: bool) -> None:
    """Show what `sweep run` would do: the changes, the trials, what is computed before them, and the plan."""
    from sweep.search.base_models import check_bases, study_bases

    check_bases(config)  # before torch is imported

    from sweep.config.diff import continued
    from sweep.config.resolve import missing, resolve
    from sweep.execution.trial import open_shards
    from sweep.preflight.checks import resolve_inputs
    from sweep.preflight.feature_cache import cache_folder
    from sweep.preflight.feature_cache import preview as preview_cache
    from sweep.preflight.plan import preview_plan
    from sweep.preflight.preview import preview as preview_sweep
    from sweep.tracking.access import tracking_uri
    from sweep.tracking.uri_check import check_uri

    check_uri(tracking_uri(folder))
    config = continued(config, folder)
    resolved = None if missing(config) else resolve(config)
    bases = study_bases(config, fetch=False) if resolved and (folder / "config.yaml").exists() else None
    fingerprint = open_shards(resolved).fingerprint if resolved else None
    preview = preview_sweep(config, folder, fingerprint, bases, allow_other_base)
    console.print(preview_table(preview))
    if preview.refused:
        sys.exit(ExitCode.BAD_INPUT)
    if resolved and (preview.resumed or preview.points or preview.drawn):
        resolve_inputs(config, allow_other_base, fetch=False)
        cache = cache_folder(config, folder)
        for line in preview_cache(resolved, cache, len(preview.resumed) + len(preview.points) + preview.drawn):
            print_line(line)
        for line in preview_plan(resolved, cache, folder):
            print_line(line)
