"""Secrets planted in the environment of a command, and a search for them in everything that it wrote."""

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.forked import Forked
from tests.sweep.common import Outcome, sweep

NAMES = """MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN HF_TOKEN AWS_ACCESS_KEY_ID
    AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN PGPASSWORD RAY_AUTH_TOKEN""".split()
LOGS = {"gcs_server.out", "raylet.out", "dashboard_agent.log"}  # of Ray, which must be among the searched files


def plant() -> dict[str, str]:
    """Return a value for every variable that may hold a secret."""
    return {name: secrets.token_hex(16) for name in NAMES}


def sweep_with_secrets(planted: Mapping[str, str], *args: str) -> tuple[Outcome, set[Path]]:
    """Run a command in a process that has the secrets; keep the folders of Ray and Tune, which it would delete.

    All but the demo get one CPU, and so train one trial at a time: each more is a set of Ray's processes.

    Returns:
        How it ended, and the folders outside the working folder that were kept.
    """
    return Forked(lambda: _keep_ray(planted, args)).result()


def _keep_ray(planted: Mapping[str, str], args: Sequence[str]) -> tuple[Outcome, set[Path]]:
    os.environ.update(planted)
    if "demo" not in args:
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    kept, delete = set(), shutil.rmtree

    def keep(path: Path, *more: Any, **options: Any) -> None:
        if Path(path).name == "ray" or Path(path).name.startswith("sweep-ray-"):
            kept.add(Path(path))
        else:
            delete(path, *more, **options)

    shutil.rmtree = keep
    return sweep(*args), {path for path in kept if path.name.startswith("sweep-ray-")}


def files(folder: Path) -> list[Path]:
    """Return all regular files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def found_in(paths: Iterable[Path], planted: Mapping[str, str]) -> list[str]:
    """Return which secrets are in which files."""
    contents = ((path, path.read_bytes()) for path in paths)
    return [f"{name} in {path}" for path, text in contents for name, value in planted.items() if value.encode() in text]
