"""Secrets planted in the environment of a command, and a search for them in everything that it wrote."""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

NAMES = """MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN HF_TOKEN AWS_ACCESS_KEY_ID
    AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN PGPASSWORD RAY_AUTH_TOKEN""".split()
# The `sweep` command, except that it keeps the folders of Ray and Tune, which it would delete, and names them.
KEEPING_RAY = """
import shutil
from pathlib import Path
from sweep.cli.app import main
delete = shutil.rmtree
def keep(path, *args, **options):
    if Path(path).name == "ray" or Path(path).name.startswith("sweep-ray-"):
        print("kept", path, flush=True)
    else:
        delete(path, *args, **options)
shutil.rmtree = keep
main()
"""
LOGS = {"gcs_server.out", "raylet.out", "dashboard.log"}  # of Ray, which must be among the files that are searched


def plant() -> dict[str, str]:
    """Return a value for every variable that may hold a secret."""
    return {name: secrets.token_hex(16) for name in NAMES}


def kept_folders(output: str) -> list[Path]:
    """Return the folders outside the working folder that a command kept, from what it printed."""
    kept = {Path(line.removeprefix("kept ")) for line in output.splitlines() if line.startswith("kept ")}
    return [path for path in kept if path.name.startswith("sweep-ray-")]


def files(folder: Path) -> list[Path]:
    """Return all regular files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def found_in(paths: Iterable[Path], planted: Mapping[str, str]) -> list[str]:
    """Return which secrets are in which files."""
    contents = ((path, path.read_bytes()) for path in paths)
    return [f"{name} in {path}" for path, text in contents for name, value in planted.items() if value.encode() in text]
