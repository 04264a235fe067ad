"""Frozen passes: what models that no trial changes make of a corpus, computed once by Ray Data before the trials start.

space ─► needs of trials that may be drawn ─► what is missing ─► Ray Data: jobs ─► <cache>/<kind>/<key>/

The kinds are features of encoders (`sweep.features`) and what distillations learn from (`sweep.teacher`). A trial whose
files are all there reads them; any other computes by itself, with the same bits.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
from filelock import FileLock

from data.errors import StorageError
from data.formats import format_bytes, format_duration
from data.loading.array_files import ABOUT, Part
from data.loading.ray_source import ray_jobs
from data.shards.store import LOCK, Store
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.config.space import Axis
from sweep.execution.cluster import ClusterError
from sweep.preflight import encoder_pass as features
from sweep.preflight import teacher_pass as teacher
from sweep.search.candidates import candidates, resolve_candidate

MOST = 64  # combinations of a kind's axes that are looked at
RANGE = 8  # whole numbers of a range that are
SMALL = 2e11  # positions times parameters: about ten seconds of one CPU
FEW, MOMENT = 8, 2.0  # rows, or s, that are computed beforehand, to say how long all will take
EVERY = 10.0  # seconds between two lines about the progress
# Numbers of which only counts whether they are 0.
SIGN = (
    "tasks.",
    "train.losses.distillation",
    "train.losses.hidden",
    "model.encoder.dropout",
    "model.encoder.spec_augment",
)
Say = Callable[[str], None]


class CacheRequest(Protocol):
    """Files of a key that trials of a sweep read."""

    @property
    def recipe(self) -> Any:
        """What the numbers depend on: a dataclass with a `key`."""

    @property
    def config(self) -> ResolvedConfig:
        """Of such a trial."""

    @property
    def folder(self) -> Path:
        """Where they lie."""

    @property
    def parts(self) -> Sequence[Part[Any]]:
        """All of the files."""

    @property
    def missing(self) -> Sequence[Part[Any]]:
        """Those that have not been computed."""

    def describe(self) -> str:
        """In words: whose pass it is, and over how much."""

    def shown(self, size: int) -> str:
        """The size of parts, in words."""

    def work(self, size: int) -> float:
        """What parts of such a size cost to compute: positions times parameters."""

    @property
    def epoch(self) -> int:
        """The size of what a trial reads in an epoch."""

    def bytes(self, parts: Sequence[Part[Any]]) -> int:
        """What parts take on the disk."""

    @property
    def reading(self) -> tuple[str, ...]:
        """Needs with the same are met by one pass: of the same model over the same rows."""

    def jobs(self, parts: Sequence[Part[Any]], needs: Sequence[Any]) -> "Sequence[Job]":
        """The work, a job a part: for those of the needs, all of this reading, that miss it."""


class Read(NamedTuple):
    """A need, and how many epochs of trials read it."""

    need: CacheRequest
    epochs: float


class Job(Protocol):
    """Work on a part; travels to the process that does it."""

    @property
    def part(self) -> Part[Any]:
        """What is computed, and what it is called."""

    def compute(self, rows: Sequence[Any]) -> Any:
        """Compute some of its rows, and write nothing."""

    def __call__(self) -> pa.Table:
        """Compute all and write them; a table with the part's size."""


KINDS: dict[str, tuple[tuple[str, ...], Callable[[ResolvedConfig, Path], CacheRequest | None]]] = {
    "features": (features.AXES, features.need_of),
    "taught": (teacher.AXES, teacher.need_of),
}


def cache_of(config: Config, sweep_folder: Path) -> Path:
    """Where what trials share is kept: beside the sweep, whose place all nodes see."""
    return sweep_folder.absolute().parent / (config.storage.cache or "cache")


def needs(config: ResolvedConfig, cache: Path) -> list[CacheRequest]:
    """What trials of a sweep may read, as far as the axes that decide about it can be counted."""
    return [need for need, _ in _counted(config, cache)]


def _counted(config: ResolvedConfig, cache: Path) -> list[tuple[CacheRequest, float]]:
    """The needs, each with the share of the trials that have it, as if all values were drawn equally often."""
    found: dict[tuple[Any, ...], tuple[CacheRequest, float]] = {}
    space = config.search.space
    for axes, need_of in KINDS.values():
        drawn = candidates(config, {key: _values(key, space[key]) for key in space if key.startswith(axes)}, MOST)
        for candidate in drawn:
            trial = resolve_candidate(config, candidate.values)
            need = None if trial is None else need_of(trial, cache)
            if need is not None:
                key = (need.folder, *(part.name for part in need.parts))
                first, share = found.get(key, (need, 0.0))
                found[key] = (first, share + 1 / len(drawn))
    return list(found.values())


def folders_for(config: ResolvedConfig, cache: Path) -> dict[str, str | None]:
    """Where a trial reads what, by kind; None where the files are not all there, or it has no use for any."""
    own = {kind: need_of(config, cache) for kind, (_, need_of) in KINDS.items()}
    return {kind: None if need is None or need.missing else str(need.folder) for kind, need in own.items()}


def used(folders: Mapping[str, str | None]) -> None:
    """Note that a trial reads there now: `sweep cache prune` goes by that."""
    for place in filter(None, folders.values()):
        (Path(place) / ABOUT).touch()


def described(need: CacheRequest) -> str:
    """In a line: what is computed, over how much, and the disk it takes."""
    whole, left = need.parts, need.missing
    state = "there already" if not left else f"{len(left)} of {len(whole)} parts to compute"
    size = need.shown(sum(part.size for part in whole))
    return f"{need.describe()}: {size}, {format_bytes(need.bytes(whole))}, once for all trials; {state}"


def compute(config: ResolvedConfig, cache: Path, say: Say) -> None:
    """Compute what is missing, on all nodes; a kill loses the parts that were under way.

    Raises:
        StorageError: there is no room for them.
        ClusterError: the cluster went away.
    """
    import ray

    search, epochs = config.search, config.train.epochs
    passes = search.trials * search.mean_epochs(epochs) * search.expected_share(epochs, search.trials)
    groups: dict[tuple[str, ...], list[Read]] = {}
    for need, share in _counted(config, cache):
        groups.setdefault(need.reading, []).append(Read(need, passes * share))
    for group in groups.values():
        with contextlib.ExitStack() as held:
            lacking = []
            for own in sorted(group, key=lambda one: one.need.folder):  # in one order: another sweep may be at them
                own.need.folder.mkdir(parents=True, exist_ok=True)
                with contextlib.ExitStack() as lock:
                    lock.enter_context(FileLock(own.need.folder / LOCK))
                    Store(own.need.folder).write(ABOUT, json.dumps(asdict(own.need.recipe), indent=1).encode())
                    if own.need.missing:
                        lacking.append(own)
                        held.enter_context(lock.pop_all())  # a need that is met makes nobody wait
            try:
                if lacking:
                    _compute(lacking, say)
            except ray.exceptions.RayError as error:
                raise ClusterError(f"the frozen passes were lost ({error}); the same command goes on") from None


def _compute(group: Sequence[Read], say: Say) -> None:
    """Meet needs of one reading in one pass."""
    needs = [own.need for own in group]
    for need in needs:
        say(described(need))
    _check_room(needs)
    need, left = needs[0], list({part.name: part for own in needs for part in own.missing}.values())
    jobs, works, done = need.jobs(left, needs), [_work(needs, part) for part in left], 0
    work, total = sum(works), sum(job.part.size for job in jobs)

    def spared(seconds: float) -> str:
        """Each epoch would compute its own need anew."""
        online = sum(own.epochs * own.need.work(own.need.epoch) for own in group) / work
        return f"about {format_duration(max(0.0, seconds * online - seconds))}"

    if work > SMALL and _gpus(need) == 0:  # here is no GPU that would tell
        seconds = _expected(jobs[0]) * left[0].size * work / works[0]
        say(f"frozen passes: about {format_duration(seconds)} of a worker, which spares the trials {spared(seconds)}")
    started = told = time.monotonic()
    for table in _done(need, jobs, work):
        done += table["size"][0].as_py()
        now = time.monotonic()
        if now - told >= EVERY and done < total:
            told = now
            say(f"frozen passes: {done / total:.0%}, about {(now - started) * (total / done - 1):.0f} s left")
    taken = time.monotonic() - started
    size = need.shown(sum(part.size for part in left))
    say(f"frozen passes: {size} in {taken:.1f} s, which spares the trials {spared(taken)}")


def _work(needs: Sequence[CacheRequest], part: Part[Any]) -> float:
    """What one pass over a part takes: as much as the deepest need that misses it."""
    return max(own.work(part.size) for own in needs if not (own.folder / part.name).exists())


def _expected(job: Job) -> float:
    """Seconds of a worker for a size of 1, from a few rows, computed here and thrown away."""
    part, size = job.part, 0
    job.compute(part.rows[:1])  # which loads the model, too
    started = time.monotonic()
    for place in range(0, len(part.rows), math.ceil(len(part.rows) / FEW)):
        job.compute(part.rows[place : place + 1])
        size += part.sizes[place]
        if time.monotonic() - started > MOMENT:
            break
    return (time.monotonic() - started) / size


def _done(need: CacheRequest, jobs: Sequence[Job], work: float) -> Iterator[pa.Table]:
    """The results of jobs: by Ray Data, unless its processes would take longer to start than the work takes here."""
    if work <= SMALL and _gpus(need) == 0:
        return (job() for job in jobs)
    return ray_jobs(jobs, cpus=need.config.resources.cpus_per_worker, gpus=_gpus(need))


def _gpus(need: CacheRequest) -> float:
    return need.config.resources.gpus_per_worker


def _check_room(needs: Sequence[CacheRequest]) -> None:
    folder, size = needs[0].folder, sum(need.bytes(need.missing) for need in needs)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"{folder}: what is computed takes {format_bytes(size)} and {format_bytes(free)} are free; free some "
            "space (`sweep cache prune`), name another folder in storage.cache, or set storage.features=live"
        )


def _values(key: str, axis: Axis) -> list[Any]:
    if key.startswith(SIGN):
        return list({value > 0: value for value in axis.extremes()}.values())
    if axis.choices is not None:
        return list(axis.choices)
    low, high, step = axis.low, axis.high, axis.step or 1
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
        return list(range(low, high + 1, step))[:RANGE]
    return []  # a continuous axis: its trials compute by themselves
