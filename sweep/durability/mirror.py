"""A copy of the sweep's folder in a store behind a URL (s3://, gs://), from which another machine goes on.

A thread of the driver writes what changed; training never waits for it. What the copy lacks after a kill is done again:
a trial whose last reports are not in the ledger's copy tells them from its checkpoint.
"""

import contextlib
import dataclasses
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.atomic import write_file
from data.errors import DataError, UserError, reason
from data.shards.store import Store
from sweep.durability import lease
from sweep.durability.lease import Holder, LeaseHeldError, LeaseLostError
from sweep.search.study_storage import FILE as JOURNAL

OWNER = "owner.json"  # in the store: who writes the copy, and how often it was taken over
RECORD = "mirror.json"  # in the folder: which files the copy has
ROOT = ("config.yaml", "sweep-id", "mlflow.json", "plan.json", JOURNAL)
TRIAL = ("config.yaml", "checkpoint.pt", "metrics.jsonl", "predictions.json", "mlflow.json", "token_budget")
EVERY = 10.0  # seconds between two looks at what changed, and between heartbeats
PATIENCE = 40.0  # seconds without a heartbeat after which the writer is dead
SETTLE = 2.0  # seconds in which the first of two that took over sees that he is not the last
Say = Callable[[str], None]


class Mirror(threading.Thread):
    """Keeps the copy up to date until `finish` is called."""

    def __init__(self, folder: Path, url: str, owner: Holder, generation: int, every: float) -> None:
        super().__init__(daemon=True, name="mirror")
        self.folder, self.url, self.owner, self.every = folder, url, owner, every
        self.generation = generation
        self.known: dict[str, list[int]] = _record(folder)["files"]
        self.ended, self.lost = threading.Event(), threading.Event()
        self.error: str | None = None
        self.complete = False

    def check(self) -> None:
        """Raise Lost where another machine has taken the sweep over."""
        if self.lost.is_set():
            raise LeaseLostError(
                f"{self.folder}: another machine took this sweep over; this process stops writing to it"
            )

    def finish(self, timeout: float) -> bool:
        """Write what is left; False when the store did not take it all within `timeout` seconds."""
        self.ended.set()
        self.join(timeout)
        return self.complete

    def run(self) -> None:
        while not self.lost.is_set():
            last = self.ended.is_set()
            try:
                self._beat(last=False)
                self._sync()
                self.error = None
                if last:
                    self._beat(last=True)
                    self.complete = True
                    return
            except LeaseLostError:
                self.lost.set()
            except (UserError, OSError) as error:  # the store is away: this is tried again
                self.error = reason(error)
            if self.ended.is_set():
                time.sleep(min(self.every, 1.0))
            else:
                self.ended.wait(self.every)

    def _beat(self, last: bool) -> None:
        store = Store(self.url)
        now = _owner(store)
        if now is not None and now[0].token != self.owner.token:
            raise LeaseLostError
        self.owner = dataclasses.replace(self.owner, beat=self.owner.beat + 1)
        _write_owner(store, self.owner, self.generation, open_=not last)

    def _sync(self) -> None:
        """Trials first: a ledger that knows less than they do learns it from them."""
        numbers = sorted(path.name for path in self.folder.glob("trials/*"))
        for number in numbers:
            self._sync_folder(f"trials/{number}", TRIAL)
        self._sync_folder("", ROOT)

    def _sync_folder(self, place: str, names: tuple[str, ...]) -> None:
        store = None
        for name in names:
            key, path = f"{place}/{name}".lstrip("/"), self.folder / place / name
            state = _state(path)
            if state == self.known.get(key):
                continue
            store = store or Store(below(self.url, place))
            if state is None:
                store.delete(name)
                del self.known[key]
            else:
                with contextlib.suppress(FileNotFoundError):  # replaced or deleted in this moment: the next look sees
                    store.write(name, path.read_bytes())
                    self.known[key] = state
            _write_record(self.folder, self.generation, self.known)


@contextlib.contextmanager
def mirrored(
    folder: Path, url: str, say: Say, every: float = EVERY, patience: float = PATIENCE, settle: float = SETTLE
) -> Iterator[Mirror]:
    """Take the copy over, bring the folder up to date with it, and keep it up to date while the block runs.

    Args:
        folder: of the sweep, held by a lease of this machine.
        url: of the copy.
        say: is told, in a line, what is waited for or fetched.
        every: seconds between two looks at what changed.
        patience: seconds without a heartbeat after which its writer is dead.
        settle: seconds after a takeover until it counts.

    Raises:
        Busy: another machine works on it.
        DataError: the store cannot be used.
    """
    store, owner = Store(url), lease.ourselves()
    generation = _wait_for_the_dead(store, folder, say, patience)
    if generation and generation != _record(folder)["generation"]:
        say(f"fetching the sweep from {url.partition('?')[0]}")
        fetch(folder, url)
    _write_owner(store, owner, generation + 1, open_=True)
    if generation:
        time.sleep(settle)  # of two that found a dead writer at the same moment, the last one to write holds the copy
        now = _owner(store)
        if now is None or now[0].token != owner.token:
            raise LeaseHeldError(f"{folder}: another machine took this sweep over at the same moment; it goes on there")
    _write_record(folder, generation + 1, _record(folder)["files"])
    mirror = Mirror(folder, url, owner, generation + 1, every)
    mirror.start()
    try:
        yield mirror
    finally:
        mirror.ended.set()


def fetch(folder: Path, url: str) -> None:
    """Make the folder what the copy is; a trial that only this folder knows is of a past that did not count."""
    shutil.rmtree(folder / "trials", ignore_errors=True)
    known: dict[str, list[int]] = {}
    numbers = [number for number in Store(below(url, "trials")).names() if number.isdigit()]
    trials = [f"trials/{number}" for number in numbers]
    for place in [*trials, ""]:
        store = Store(below(url, place))
        for name in sorted(set(store.names()) & set(TRIAL if place else ROOT)):
            path = folder / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, store.read(name))
            known[f"{place}/{name}".lstrip("/")] = _state(path) or []
    _write_record(folder, 0, known)


def below(url: str, place: str) -> str:
    """The URL of a folder within another; options of the URL stay at its end."""
    head, mark, options = url.partition("?")
    return f"{head.rstrip('/')}/{place}{mark}{options}" if place else url


def _wait_for_the_dead(store: Store, folder: Path, say: Say, patience: float) -> int:
    """Return when nobody alive writes the copy: how often it was taken over; 0 if there is none."""
    found = _owner(store)
    if found is None:
        return 0
    owner, generation, is_open = found
    here = (owner.boot, owner.host) == (lease.boot(), socket.gethostname())
    if not is_open or (here and not lease.alive(owner)):
        return generation
    say(f"{lease.in_words(owner)}: has not given this sweep back; watching for {patience:.0f} s whether it is alive")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(patience / 20)
        if (now := _owner(store)) != found:
            if now is not None and not now[2]:
                return now[1]
            who = lease.in_words(owner)
            raise LeaseHeldError(f"{folder}: another machine works on this sweep ({who}); wait for it, or end it first")
    return generation


def _owner(store: Store) -> tuple[Holder, int, bool] | None:
    try:
        content = json.loads(store.read(OWNER))
        return Holder(**content["holder"]), content["generation"], content["open"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{store / OWNER}: says nobody's name; remove it if nobody works on the sweep") from None


def _write_owner(store: Store, owner: Holder, generation: int, open_: bool) -> None:
    content = {"holder": dataclasses.asdict(owner), "generation": generation, "open": open_}
    store.write(OWNER, json.dumps(content).encode())


def _state(path: Path) -> list[int] | None:
    """What changes with a file's content; None: it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    empty: dict[str, Any] = {"generation": 0, "files": {}}
    try:
        return dict(json.loads(path.read_text())) if path.exists() else empty
    except ValueError:
        return empty


def _write_record(folder: Path, generation: int, known: dict[str, list[int]]) -> None:
    write_file(folder / RECORD, json.dumps({"generation": generation, "files": known}))
