"""What `sweep status` says about a sweep as a whole, from any machine that sees its folder."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sweep.analysis.confirm import search_of
from sweep.analysis.results import Progress, progress
from sweep.config.paths import near
from sweep.config.schema import Config
from sweep.durability import lease
from sweep.preflight import eta as forecast
from sweep.search.pruning_audit import audit_json
from sweep.search.study import TrialRecord


def train_command(folder: Path, params: Mapping[str, Any]) -> str:
    """What trains a trial of a sweep again, by itself."""
    sets = " ".join(f"--set {key}={json.dumps(value)}" for key, value in params.items())
    return f"train {near(folder) / 'config.yaml'} {sets}"


def driver_of(folder: Path) -> tuple[str, int] | None:
    """Host and process that work on a sweep; None if the lease was given back, or has had no heartbeat for a while."""
    path = folder / lease.FILE
    try:
        age = time.time() - path.stat().st_mtime
        content = json.loads(path.read_text())
        return (str(content["host"]), int(content["pid"])) if age < lease.PATIENCE else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def status_lines(config: Config, folder: Path, entries: Sequence[TrialRecord]) -> list[str]:
    """How far a sweep is, whether somebody works on it, and what it confirms, if it is no search."""
    search = search_of(config, folder)
    compares = "" if search is None else f"`sweep confirm {near(search)}`"
    found, driver = _progress(config, folder, entries), driver_of(folder)
    if driver is not None:
        who = f"running on {driver[0]} (pid {driver[1]})"
    elif found.done >= found.target:
        who = "finished"
    elif search is not None:
        who = f"nobody works on it; {compares}, given as before, goes on"
    else:
        where = near(folder)
        who = f"nobody works on it; `sweep run {where / 'config.yaml'} --out {where}` goes on"
    what = [] if search is None else [f"trainings that confirm {near(search)}; {compares} compares them"]
    return [f"{config.name}: {found.line()}", who, *what, *forecast.lines(config, folder, entries)]


def _progress(config: Config, folder: Path, entries: Sequence[TrialRecord]) -> Progress:
    """Of trainings that confirm, none is the best."""
    found = progress(config, entries)
    return found if search_of(config, folder) is None else replace(found, best=None)


def progress_json(config: Config, folder: Path, entries: Sequence[TrialRecord]) -> dict[str, Any]:
    """The same in the form that scripts rely on."""
    found, driver = _progress(config, folder, entries), driver_of(folder)
    return {
        "target": found.target,
        "done": found.done,
        "complete": found.complete,
        "pruned": found.pruned,
        "failed": found.failed,
        "running": found.running,
        "best": None if found.best is None else found.best.number,
        "seconds_left": found.seconds_left,
        "gpu_hours": found.hours if found.device == "GPU" else None,
        "cpu_hours": found.hours if found.device == "CPU" else None,
        "pruning": audit_json(config, entries),
        "running_on": None if driver is None else driver[0],
        "pid": None if driver is None else driver[1],
    }
