"""`sweep cache`: list what trials and sweeps share on the disk, and bound it."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout
from rich.table import Table

from data.atomic import UNFINISHED
from data.errors import UserError
from data.formats import format_bytes
from data.loading.cached_arrays import ABOUT
from data.shards.store import LOCK
from sweep.cli.console import console

KINDS = ("features", "teacher")  # the folders of a cache
DAY = 86400.0  # seconds
IN_USE = 3600.0  # seconds since the last use in which a trial may still read a folder
app = typer.Typer(
    help="What sweeps share on the disk: features of frozen encoders and logits of teachers.", no_args_is_help=True
)
Folder = Annotated[Path, typer.Argument(help="`storage.cache`, or the folder `cache` beside the sweeps.")]


@dataclass(frozen=True)
class CacheEntry:
    """The files of one cache key."""

    folder: Path  # <cache>/<kind>/<key>
    about: dict[str, object]  # the fields of the cache key; empty if they cannot be read
    files: int
    bytes: int
    used: float  # time of the last use

    @classmethod
    def read(cls, folder: Path) -> "CacheEntry":
        """Read what the folder of a cache key holds."""
        about = folder / ABOUT
        try:
            content = json.loads(about.read_text())
        except (OSError, ValueError):
            content = {}
        files = [path for path in folder.glob("*.arrow") if UNFINISHED not in path.name]
        sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
        used = (about if about.exists() else folder).stat().st_mtime
        return cls(folder, content if isinstance(content, dict) else {}, len(files), sum(sizes), used)

    @property
    def settings(self) -> str:
        """Return the settings that distinguish the keys of one model."""
        if "llm" in self.about:
            return f"temperature {self.about.get('temperature', '?')}"
        pool = self.about.get("pool")
        pooled = f"pooled {pool[0]} / {pool[1]}, " if isinstance(pool, list) and len(pool) == 2 else ""
        layers, state = self.about.get("layers", 0), self.about.get("state", -1)
        heard = f"up to layer {layers}, " if layers else f"layer {state}, " if state != -1 else ""
        return f"{heard}{pooled}{self.about.get('sound', '?')}"


@app.command("ls")
def show(folder: Folder = Path("runs/cache")) -> None:
    """List the cached files by key, the last used first."""
    entries = read_cache(folder)
    table = Table()
    for name in ("key", "kind", "model", "settings", "files", "size", "last used"):
        table.add_column(name, justify="right" if name in ("files", "size") else "left")
    for entry in entries:
        age = time.time() - entry.used
        table.add_row(
            entry.folder.name,
            entry.folder.parent.name,
            Path(str(entry.about.get("encoder") or entry.about.get("llm", "?"))).name,
            entry.settings,
            str(entry.files),
            format_bytes(entry.bytes),
            f"{age / 3600:.0f} h ago" if age < 2 * DAY else f"{age / DAY:.0f} days ago",
        )
    console.print(f"{folder}: {_total(entries)}", highlight=False)
    console.print(table)


@app.command()
def prune(
    folder: Folder = Path("runs/cache"),
    days: Annotated[float | None, typer.Option(min=0, help="Delete what was not used for so many days.")] = None,
    max_gb: Annotated[
        float | None, typer.Option(min=0, help="Then delete the least recently used, until so much is left.")
    ] = None,
) -> None:
    """Delete what was not used for long; a sweep that needs it computes it again. What was used within the last hour,
    and what a sweep computes now, is kept."""
    if days is None and max_gb is None:
        raise UserError("sweep cache prune: give --days 30, or --max-gb 100, or both")
    for entry in to_prune(read_cache(folder), time.time(), days, max_gb):
        try:
            with FileLock(entry.folder / LOCK, timeout=0):
                shutil.rmtree(entry.folder, ignore_errors=True)
        except Timeout:
            console.print(f"kept {entry.folder.name}: a sweep computes it now", highlight=False)
        else:
            console.print(f"deleted {entry.folder.name}: {format_bytes(entry.bytes)}", highlight=False)
    console.print(f"{_total(read_cache(folder))} left in {folder}", highlight=False)


def read_cache(folder: Path) -> list[CacheEntry]:
    """Return all entries of a cache, the last used first.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give `cache` beside the sweeps, or the value of storage.cache")
    entries = [CacheEntry.read(path) for kind in KINDS for path in (folder / kind).glob("*/")]
    return sorted(entries, key=lambda entry: -entry.used)


def to_prune(entries: list[CacheEntry], now: float, days: float | None, max_gb: float | None) -> list[CacheEntry]:
    """Return the entries to delete from a cache whose entries are sorted, the last used first."""
    idle = [entry for entry in entries if now - entry.used >= IN_USE]
    doomed = [entry for entry in idle if days is not None and now - entry.used >= days * DAY]
    left = sum(entry.bytes for entry in entries) - sum(entry.bytes for entry in doomed)
    for entry in reversed(idle):
        if max_gb is not None and left > max_gb * 1e9 and entry not in doomed:
            doomed.append(entry)
            left -= entry.bytes
    return doomed


def _total(entries: list[CacheEntry]) -> str:
    return format_bytes(sum(entry.bytes for entry in entries))
