"""`sweep cache`: what trials and sweeps share on the disk, and how to bound it."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock, Timeout
from rich.table import Table

from data.atomic import UNFINISHED
from data.errors import UserError
from data.loading.array_files import ABOUT
from data.shards.store import LOCK
from sweep.cli.console import console

KINDS = ("features", "teacher")  # folders of a cache
DAY, JUST = 86400.0, 3600.0  # seconds; what was used within JUST may be in use
app = typer.Typer(
    help="What sweeps share on the disk: outputs of frozen encoders and of teachers.", no_args_is_help=True
)
Folder = Annotated[Path, typer.Argument(help="`storage.cache`, or the folder `cache` beside the sweeps.")]


@dataclass(frozen=True)
class Kept:
    """The files of one key."""

    folder: Path  # <cache>/<kind>/<key>
    about: dict[str, Any]
    files: int
    bytes: int
    used: float  # time


@app.command("ls")
def show(folder: Folder = Path("runs/cache")) -> None:
    """List what is kept, the last used first."""
    found = kept(folder)
    table = Table(title=f"{folder}: {_shown(sum(one.bytes for one in found))}", title_justify="left")
    for name in ("key", "of", "model", "how", "files", "size", "last used"):
        table.add_column(name, justify="right" if name in ("files", "size") else "left")
    for one in found:
        table.add_row(
            one.folder.name,
            one.folder.parent.name,
            Path(str(one.about.get("encoder") or one.about.get("llm", "?"))).name,
            _how(one.about),
            str(one.files),
            _shown(one.bytes),
            _ago(time.time() - one.used),
        )
    console.print(table)


@app.command()
def prune(
    folder: Folder = Path("runs/cache"),
    days: Annotated[float | None, typer.Option(min=0, help="Delete what was not used for so many days.")] = None,
    max_gb: Annotated[float | None, typer.Option(min=0, help="Then the longest unused, until so much is left.")] = None,
) -> None:
    """Delete what has not been used for long; it is computed again when a sweep needs it. What was used within the
    last hour stays, and what a sweep computes now."""
    if days is None and max_gb is None:
        raise UserError("sweep cache prune: say what may go: --days 30, or --max-gb 100")
    doomed = to_prune(kept(folder), time.time(), days, max_gb)
    for one in doomed:
        try:
            with FileLock(one.folder / LOCK, timeout=0):
                shutil.rmtree(one.folder, ignore_errors=True)
        except Timeout:
            console.print(f"{one.folder.name} stays: a sweep computes it", highlight=False)
        else:
            console.print(f"deleted {one.folder.name}: {_shown(one.bytes)}", highlight=False)
    console.print(f"{_shown(sum(one.bytes for one in kept(folder)))} left in {folder}", highlight=False)


def kept(folder: Path) -> list[Kept]:
    """What lies in a cache, the last used first.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it is `cache` beside the sweeps, or what storage.cache names")
    found = [path for kind in KINDS for path in (folder / kind).glob("*/")]
    return sorted(map(_kept, found), key=lambda one: -one.used)


def to_prune(found: list[Kept], now: float, days: float | None, max_gb: float | None) -> list[Kept]:
    """What is to be deleted, of what lies in a cache, the last used first."""
    idle = [one for one in found if now - one.used >= JUST]
    doomed = [one for one in idle if days is not None and now - one.used >= days * DAY]
    left = sum(one.bytes for one in found) - sum(one.bytes for one in doomed)
    for one in reversed(idle):
        if max_gb is not None and left > max_gb * 1e9 and one not in doomed:
            doomed.append(one)
            left -= one.bytes
    return doomed


def _kept(folder: Path) -> Kept:
    about = folder / ABOUT
    files = [path for path in folder.glob("*.arrow") if UNFINISHED not in path.name]
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    used = (about if about.exists() else folder).stat().st_mtime
    return Kept(folder, _read(about), len(files), sum(sizes), used)


def _how(about: dict[str, Any]) -> str:
    """The settings that tell files of a model apart."""
    if "llm" in about:
        return f"temperature {about.get('temperature', '?')}"
    pooled = "pooled {} / {}, ".format(*about["pool"]) if about.get("pool") else ""
    return f"{pooled}{about.get('sound', '?')}"


def _read(about: Path) -> dict[str, Any]:
    try:
        content = json.loads(about.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _shown(size: int) -> str:
    from data.formats import format_bytes

    return format_bytes(size)


def _ago(seconds: float) -> str:
    return f"{seconds / 3600:.0f} h ago" if seconds < 2 * DAY else f"{seconds / DAY:.0f} days ago"
