"""The state of a sweep as a whole, as `sweep status` shows it on any machine that sees its folder."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from sweep.analysis.confirm import search_of
from sweep.analysis.results import Progress, progress
from sweep.config.loader import override
from sweep.config.paths import near, shell_command
from sweep.config.schema import Config
from sweep.durability.heartbeat import Holder
from sweep.durability.lease import PATIENCE, LeaseFile
from sweep.preflight.plan_file import plan_lines
from sweep.search.cost import spent
from sweep.search.pruning_audit import AuditJson, audit_json
from sweep.search.study import TrialRecord


class ProgressJson(TypedDict):
    """The progress of a sweep as `sweep status --json` prints it."""

    target: int
    done: int
    complete: int
    pruned: int
    failed: int
    running: int
    best: int | None
    seconds_left: float | None
    gpu_hours: float | None
    cpu_hours: float | None
    budget: Mapping[str, float] | None  # what is spent of each of its limits, in their units
    ended_early: str | None  # why, where the search ended before its number of trials
    pruning: AuditJson | None
    running_on: str | None
    pid: int | None


def train_command(folder: Path, params: Mapping[str, object], program: str | Path = "sweep") -> str:
    """Return the command that trains a trial of a sweep again by itself.

    Args:
        folder: of the sweep.
        params: of the trial.
        program: the command line of this installation.
    """
    sets = [word for key, value in params.items() for word in ("--set", override(key, value))]
    return shell_command(program, "train", folder / "config.yaml", *sets)


def runner_of(folder: Path) -> Holder | None:
    """Return the process that runs a sweep; None if its lease was released, or has had no heartbeat for a while."""
    lease = LeaseFile(folder)
    try:
        return lease.read() if time.time() - lease.path.stat().st_mtime < PATIENCE else None
    except OSError:
        return None


def status_lines(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> list[str]:
    """Return the progress of a sweep, which process runs it or how to resume it, and how the plan compares."""
    search = search_of(config, folder)
    now, runner = _progress(config, folder, trials), runner_of(folder)
    if runner is not None:
        activity = f"running on {runner.host} (pid {runner.pid})"
    elif now.done >= now.target:
        activity = f"finished: {now.ended}" if now.ended else "finished"
    elif search is not None:
        command = shell_command("sweep", "confirm", search)
        activity = f"not running; rerun `{command}` with the same options to resume"
    else:
        command = shell_command("sweep", "run", folder / "config.yaml", "--out", folder)
        activity = f"not running; `{command}` resumes it"
    confirms = []
    if search is not None:
        command = shell_command("sweep", "confirm", search)
        confirms = [f"confirms the trials of {near(search)}; `{command}` compares them"]
    return [f"{config.name}: {now.line()}", activity, *confirms, *plan_lines(config, folder, trials)]


def _progress(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> Progress:
    """Return the progress; a sweep that confirms another one has no best trial."""
    now = progress(config, trials)
    return now if search_of(config, folder) is None else replace(now, best=None)


def progress_json(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> ProgressJson:
    """Return the progress in the form that scripts rely on."""
    now, runner = _progress(config, folder, trials), runner_of(folder)
    budget, used = config.search.budget, spent(config, trials)
    return {
        "target": now.target,
        "done": now.done,
        "complete": now.complete,
        "pruned": now.pruned,
        "failed": now.failed,
        "running": now.running,
        "best": None if now.best is None else now.best.number,
        "seconds_left": now.seconds_left,
        "gpu_hours": now.hours if now.device == "GPU" else None,
        "cpu_hours": now.hours if now.device == "CPU" else None,
        "budget": {name: used[name] for name in budget.limits()} if budget else None,
        "ended_early": now.ended,
        "pruning": audit_json(config, trials),
        "running_on": None if runner is None else runner.host,
        "pid": None if runner is None else runner.pid,
    }
