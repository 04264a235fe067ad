"""The mirror: a copy of the sweep's folder in a store behind a URL (s3://, gs://), from which another machine resumes.

A thread of the driver copies what has changed; training never waits for it. What the mirror lacks after a kill is done
again: a trial whose last reports are missing from the mirrored study repeats them from its checkpoint.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from data.atomic import write_file
from data.errors import DataError, UserError, reason
from data.shards.store import Store
from sweep.durability.heartbeat import Heartbeat, Holder, LeaseLostError, Say, wait_for_dead_holder
from sweep.search.corpus_notes import FILE as CORPUS_NOTES
from sweep.search.sampling.advice import FILE as EARLIER
from sweep.search.study_storage import FILE as JOURNAL

OWNER = "owner.json"  # in the store: who writes the mirror, and how often it was taken over
RECORD = "mirror.json"  # in the folder: which files the mirror has
ROOT = ("config.yaml", "sweep-id", "mlflow.json", "plan.json", CORPUS_NOTES, EARLIER, JOURNAL)
TRIAL = ("config.yaml", "checkpoint.pt", "metrics.jsonl", "predictions.json", "mlflow.json", "token_budget")
EVERY = 10.0  # seconds between two rounds of copying, and between heartbeats
PATIENCE = 40.0  # seconds without a heartbeat after which the writer is dead
SETTLE = 2.0  # seconds after a takeover until it counts
FileState = list[int]  # size and modification time, which change with a file's content


class Owner(NamedTuple):
    """Content of `owner.json`."""

    holder: Holder
    generation: int  # takeovers so far
    open: bool  # whether the holder has not released the mirror


class OwnerFile:
    """The object in the store that names the writer of the mirror."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.generation = 0  # that `write` stores
        self.written: Holder | None = None

    def load(self) -> Owner | None:
        """Return the content; None if nothing was ever copied.

        Raises:
            DataError: the store cannot be used, or the content is not what this class wrote.
        """
        store = Store(self.url)
        try:
            content = json.loads(store.read(OWNER))
            return Owner(Holder(**content["holder"]), content["generation"], content["open"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError(f"{store / OWNER}: names no writer; remove it if no process works on the sweep") from None

    def read(self) -> Holder | None:
        """Return the writer; None if the mirror was released or is new.

        A writer whose object was deleted remains the writer: its next heartbeat restores the object.
        """
        owner = self.load()
        if owner is None:
            return self.written
        return owner.holder if owner.open else None

    def write(self, holder: Holder, is_open: bool = True) -> None:
        """Store the writer."""
        content = {"holder": asdict(holder), "generation": self.generation, "open": is_open}
        Store(self.url).write(OWNER, json.dumps(content).encode())
        self.written = holder


class MirrorRecord(NamedTuple):
    """Content of `mirror.json`: which version of each file the mirror has."""

    generation: int
    files: dict[str, FileState]

    @classmethod
    def read(cls, folder: Path) -> "MirrorRecord":
        """Return the record of a sweep's folder; an empty one if it is missing or damaged."""
        try:
            content = json.loads((folder / RECORD).read_text())
            return cls(content["generation"], content["files"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return cls(0, {})

    def write(self, folder: Path) -> None:
        """Replace the record."""
        write_file(folder / RECORD, json.dumps(self._asdict()))


class Mirror(threading.Thread):
    """Keeps the mirror up to date until `finish` is called."""

    def __init__(self, folder: Path, heartbeat: Heartbeat, owner: OwnerFile, every: float) -> None:
        super().__init__(daemon=True, name="mirror")
        self.folder, self.heartbeat, self.owner, self.every = folder, heartbeat, owner, every
        self.record = MirrorRecord(owner.generation, MirrorRecord.read(folder).files)
        self.ended = threading.Event()
        self.error: str | None = None
        self.complete = False

    def check(self) -> None:
        """Raise a LeaseLostError where another machine has taken the sweep over; ask no server."""
        if self.heartbeat.lost.is_set():
            self.heartbeat.check()

    def finish(self, timeout: float) -> bool:
        """Copy what is left; return False if the store did not take it all within `timeout` seconds."""
        self.ended.set()
        self.join(timeout)
        return self.complete

    def run(self) -> None:
        """Copy what has changed, round by round, and release the mirror after the last round."""
        while not self.heartbeat.lost.is_set():
            last = self.ended.is_set()
            try:
                self.heartbeat.beat()
                # Trials come first: a study that knows less than they do learns it from them.
                for path in sorted(self.folder.glob("trials/*")):
                    self._copy(f"trials/{path.name}", TRIAL)
                self._copy("", ROOT)
                self.error = None
                if last:
                    self.heartbeat.beat()
                    self.owner.write(self.heartbeat.holder, is_open=False)
                    self.complete = True
                    return
            except LeaseLostError:
                return
            except (UserError, OSError) as error:  # the store is away: the next round tries again
                self.error = reason(error)
            if self.ended.is_set():
                time.sleep(min(self.every, 1.0))
            else:
                self.ended.wait(self.every)

    def _copy(self, subfolder: str, names: tuple[str, ...]) -> None:
        """Copy the files of a folder that have changed, and delete those that are gone."""
        store, files = None, self.record.files
        for name in names:
            key, path = f"{subfolder}/{name}".lstrip("/"), self.folder / subfolder / name
            state = _state(path)
            if state == files.get(key):
                continue
            store = store or Store(below(self.url, subfolder))
            if state is None:
                store.delete(name)
                del files[key]
            else:
                with contextlib.suppress(FileNotFoundError):  # replaced or deleted at this moment: the next round sees
                    store.write(name, path.read_bytes())
                    files[key] = state
            self.record.write(self.folder)

    @property
    def url(self) -> str:
        """URL of the mirror."""
        return self.owner.url


@contextlib.contextmanager
def mirrored(
    folder: Path, url: str, say: Say, every: float = EVERY, patience: float = PATIENCE, settle: float = SETTLE
) -> Iterator[Mirror]:
    """Take the mirror over, bring the folder up to date with it, and keep it up to date while the block runs.

    Args:
        folder: of the sweep, held by a lease of this machine.
        url: of the mirror.
        say: shows a line to the user when there is something to wait for or to fetch.
        every: seconds between two rounds of copying.
        patience: seconds without a heartbeat after which its writer is dead.
        settle: seconds after a takeover until it counts.

    Raises:
        LeaseHeldError: another machine works on it.
        DataError: the store cannot be used.
    """
    owner = OwnerFile(url)
    heartbeat = Heartbeat(owner, folder)
    wait_for_dead_holder(owner, folder, patience, patience / 20, say)
    previous = owner.load()
    if previous is not None and previous.generation != MirrorRecord.read(folder).generation:
        say(f"fetching the sweep from {url.partition('?')[0]}")
        fetch(folder, url)
    owner.generation = previous.generation + 1 if previous is not None else 1
    heartbeat.take_over(settle if previous is not None else 0.0)
    mirror = Mirror(folder, heartbeat, owner, every)
    mirror.record.write(folder)
    mirror.start()
    try:
        yield mirror
    finally:
        mirror.ended.set()


def fetch(folder: Path, url: str) -> None:
    """Make the folder equal to the mirror; trials that only this folder has belong to a history that does not count."""
    shutil.rmtree(folder / "trials", ignore_errors=True)
    record = MirrorRecord(0, {})
    numbers = [number for number in Store(below(url, "trials")).names() if number.isdigit()]
    for subfolder in [*(f"trials/{number}" for number in numbers), ""]:
        store = Store(below(url, subfolder))
        for name in sorted(set(store.names()) & set(TRIAL if subfolder else ROOT)):
            path = folder / subfolder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, store.read(name))
            record.files[f"{subfolder}/{name}".lstrip("/")] = _state(path) or []
    record.write(folder)


def below(url: str, subfolder: str) -> str:
    """Return the URL of a folder within another; options of the URL stay at its end."""
    head, mark, options = url.partition("?")
    return f"{head.rstrip('/')}/{subfolder}{mark}{options}" if subfolder else url


def _state(path: Path) -> FileState | None:
    """Return what changes with a file's content; None if it does not exist."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]
