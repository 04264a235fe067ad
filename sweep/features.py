"""Frozen passes: what the encoders of a sweep make of its corpus, computed once by Ray Data before the trials start.

space ─► recipes of trials that may be drawn ─► what is missing ─► Ray Data: a job, a file ─► <cache>/features/<key>/

A trial whose features are all there reads them; any other encodes by itself, with the same bits.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from data.errors import ConfigError, StorageError
from data.features import ABOUT, BYTES, Part, missing, parts
from data.schema import SAMPLE_RATE
from data.store import LOCK, Store
from data.stream import ray_jobs
from model.features import Job, Recipe, pooling, recipe
from model.speech_llm import SpeechLLM
from sweep import builtin
from sweep.cluster import ClusterError
from sweep.config import Config
from sweep.inputs import skeleton
from sweep.retention import shown_size
from sweep.space import Axis
from sweep.trial import open_shards

# Axes that decide which features a trial reads, if any.
AXES = (
    "model.encoder.path",
    "model.encoder.dtype",
    "model.adapter.kind",
    "model.adapter.window",
    "model.adapter.stride",
    "model.modality",
    "model.trainable",
    "model.precision",
    "model.init_from",
    "data.sound",
    "data.snr_db",
    "data.augment.speeds",
    "data.augment.noise_db",
)
MOST = 64  # combinations of their values that are looked at
RANGE = 8  # whole numbers of a range that are
SMALL = 1e6  # hours of sound times parameters of the encoder: about ten seconds of one CPU
EVERY = 10.0  # seconds between two lines about the progress
Say = Callable[[str], None]
_BUILT: dict[str, SpeechLLM] = {}  # without weights


@dataclass(frozen=True)
class Need:
    """Features that trials of a sweep read."""

    recipe: Recipe
    config: Config  # of such a trial
    folder: Path

    @property
    def all(self) -> list[Part]:
        """The files they lie in."""
        return parts(open_shards(self.config.data), self.config.data)

    @property
    def missing(self) -> list[Part]:
        """Those that have not been computed."""
        return missing(self.folder, open_shards(self.config.data), self.config.data)

    def describe(self) -> str:
        """In a line: what is computed, how much sound that is, and the disk it takes."""
        whole, left = self.all, self.missing
        hours = sum(part.samples for part in whole) / SAMPLE_RATE / 3600
        kept = "" if self.recipe.pool is None else ", pooled by {} / {}".format(*self.recipe.pool)
        sound = "" if self.recipe.sound == "recorded" else f", {self.recipe.sound}"
        state = "there already" if not left else f"{len(left)} of {len(whole)} parts to compute"
        path = self.recipe.encoder
        name = Path(path).name if Path(path).exists() else path
        what = f"frozen {name}{kept}{sound}: {hours:.3g} h of sound"
        return f"{what}, {shown_size(size_of(self.config, whole))}, once for all trials; {state}"


def cache_of(config: Config, sweep_folder: Path) -> Path:
    """Where what trials share is kept: beside the sweep, whose place all nodes see."""
    return sweep_folder.absolute().parent / (config.storage.cache or "cache")


def needs(config: Config, cache: Path) -> list[Need]:
    """The features that trials of a sweep may read, as far as the axes that decide about them can be counted."""
    found: dict[str, Need] = {}
    for values in _combinations(config):
        try:
            trial = builtin.resolve(config.with_values(values | {"search.space": {}, "search.points": []}))
        except ConfigError:
            continue  # values that are allowed one by one and not together
        need = need_of(trial, cache)
        if need is not None:
            found.setdefault(need.recipe.key, need)
    return list(found.values())


def need_of(config: Config, cache: Path) -> Need | None:
    """The features that a trial may read in place of the sound; None if its encoder trains, or hears otherwise."""
    augment = config.data.augment
    if config.storage.features == "live" or not config.model.hears or augment.speeds or augment.noise_db:
        return None
    if not _is_frozen(config):
        return None
    device = "cuda" if config.resources.gpus_per_worker > 0 else "cpu"
    made = recipe(config.model, config.data, device)
    return Need(made, config, cache / "features" / made.key)


def folder_for(config: Config, cache: Path) -> Path | None:
    """Where a trial reads its features; None where they are not all there."""
    need = need_of(config, cache)
    return None if need is None or need.missing else need.folder


def compute(config: Config, cache: Path, say: Say) -> None:
    """Compute what is missing, on all nodes; a kill loses the parts that were under way.

    Raises:
        StorageError: there is no room for them.
        ClusterError: the cluster went away.
    """
    import ray

    for need in needs(config, cache):
        need.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(need.folder / LOCK):  # another sweep may be at it
            Store(need.folder).write(ABOUT, json.dumps(asdict(need.recipe), indent=1).encode())
            if left := need.missing:
                say(need.describe())
                _check_room(need, left)
                try:
                    _compute(need, left, say)
                except ray.exceptions.RayError as error:
                    raise ClusterError(f"the frozen passes were lost ({error}); the same command goes on") from None


def _compute(need: Need, left: list[Part], say: Say) -> None:
    resources, shards = need.config.resources, open_shards(need.config.data)
    threads = max(1, int(resources.cpus_per_worker))
    jobs = [Job(shards, part, need.config.data, need.recipe, need.folder, threads) for part in left]
    total, done = sum(part.samples for part in left), 0
    started = told = time.monotonic()
    for table in _done(jobs, total, need):
        done += table["samples"][0].as_py()
        now = time.monotonic()
        if now - told >= EVERY and done < total:
            told = now
            say(f"frozen passes: {done / total:.0%}, about {(now - started) * (total / done - 1):.0f} s left")
    taken, hours = time.monotonic() - started, total / SAMPLE_RATE / 3600
    say(f"frozen passes: {hours:.3g} h of sound in {taken:.1f} s, which every epoch of every trial is spared")


def _done(jobs: list[Job], total: int, need: Need) -> Iterator[pa.Table]:
    """The results of jobs: by Ray Data, unless its processes would take longer to start than the work takes here."""
    resources, model = need.config.resources, _structure(need.config)
    assert model.encoder is not None
    size = sum(parameter.numel() for parameter in model.encoder.parameters())
    if total / SAMPLE_RATE / 3600 * size <= SMALL and resources.gpus_per_worker == 0:
        return (job() for job in jobs)
    return ray_jobs(jobs, cpus=resources.cpus_per_worker, gpus=resources.gpus_per_worker)


def size_of(config: Config, whole: list[Part]) -> int:
    """Bytes of features."""
    model, shards = _structure(config), open_shards(config.data)
    assert model.encoder is not None
    assert model.adapter is not None
    frames = [model.encoder.frames(shards.columns["n_samples"][row]) for part in whole for row in part.rows]
    pooled = pooling(config.model) is not None
    return sum(model.adapter.embeddings(count) if pooled else count for count in frames) * model.encoder.width * BYTES


def _check_room(need: Need, left: list[Part]) -> None:
    size, free = size_of(need.config, left), shutil.disk_usage(need.folder).free
    if size > free:
        raise StorageError(
            f"{need.folder}: the features take {shown_size(size)} and {shown_size(free)} are free; free some space "
            "(`sweep cache prune`), name another folder in storage.cache, or set storage.features=live"
        )


def _combinations(config: Config) -> Iterator[dict[str, Any]]:
    axes = {key: _values(axis) for key, axis in config.search.space.items() if key in AXES}
    product = itertools.product(*([(key, value) for value in values] for key, values in axes.items()))
    yield from map(dict, itertools.islice(product, MOST))


def _values(axis: Axis) -> list[Any]:
    if axis.choices is not None:
        return list(axis.choices)
    low, high, step = axis.low, axis.high, axis.step or 1
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
        return list(range(low, high + 1, step))[:RANGE]
    return []  # a continuous axis: its trials encode by themselves


def _is_frozen(config: Config) -> bool:
    model = _structure(config)
    return model.encoder_is_frozen and not model.has_own_encoder


def _structure(config: Config) -> SpeechLLM:
    """The model of a trial, as far as its encoder is concerned: others need not be built anew."""
    keys = {"encoder", "trainable", "init_from", "init_partial", "modality", "adapter"}
    key = config.model.model_dump_json(include=keys)
    if key not in _BUILT:
        _BUILT[key] = skeleton(config)
    return _BUILT[key]
