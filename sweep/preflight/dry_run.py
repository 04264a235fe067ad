"""The planner: before the trials start, dry steps of each shape say which cannot fit and how long the sweep will take.

space ─► shapes ─► dry steps, as the trials will run ─► plan.json ─► what is drawn, the forecast; at the end, the truth
"""

import hashlib
import heapq
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError, reason
from data.formats import format_bytes, format_duration
from model.runtime import memory
from model.training import dry_run as dryrun
from model.training.dry_run import Measured
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.config.version import code_version
from sweep.execution.cluster import ClusterError
from sweep.execution.resources import Nodes, count_slots, memory_share, worker_resources
from sweep.execution.trial import build, open_shards
from sweep.preflight import cache_passes as frozen
from sweep.preflight import eta as forecast
from sweep.preflight.checks import skeleton
from sweep.preflight.eta import Forecast
from sweep.preflight.trial_profiles import TrialProfile, alike, shapes
from sweep.search.candidates import Values
from sweep.search.cost import device_seconds, format_device_hours
from sweep.search.study import StudyStore, TrialRecord, horizon
from sweep.search.study_storage import has_study

SMALL = 20 * 10**6  # parameters: a process of its own would take longer to start than such dry steps take
START = 20.0  # seconds until the workers of a slot are up, see `sweep.slot`
Said = dict[str, Any]  # what `dry_steps` returns
Say = Callable[[str], None]


@dataclass(frozen=True)
class ProfileResult:
    """A shape, and what its dry steps said."""

    shape: TrialProfile
    measured: Measured | None  # None: they did not come to their end
    build: float  # seconds until a trial trains
    have: int  # bytes that a worker may take
    full: str  # why there is not enough memory; empty: there is
    trouble: str  # why nothing is known; empty: nothing is wrong

    @property
    def fits(self) -> bool:
        """Whether its trials may start: only what was seen to be too large may not."""
        return not self.full

    @property
    def epoch(self) -> float:
        """Seconds."""
        return 0.0 if self.measured is None else self.measured.train + self.measured.val


@dataclass(frozen=True)
class Plan:
    """What the dry steps say about a sweep."""

    config: Config
    tried: list[ProfileResult]
    left_out: int  # shapes that were not tried

    def fits(self, values: Values) -> bool:
        """Whether a trial with these values may start: unless all shapes that stand for it are too large."""
        found = self._alike(values)
        return not found or any(own.fits for own in found)

    def _alike(self, values: Values) -> list[ProfileResult]:
        return [self.tried[place] for place in alike(values, [own.shape.values for own in self.tried])]

    def excluded(self) -> list[str]:
        """A line for each shape that is too large."""
        return [f"cannot fit, so not started: {own.shape}: {own.full}" for own in self.tried if not own.fits]

    def notes(self) -> Iterator[str]:
        """What else there is to know."""
        for own in self.tried:
            if own.trouble:
                yield f"{own.shape}: could not be tried ({own.trouble})"
            elif own.measured and own.measured.budget < own.shape.config.train.token_budget:
                yield f"{own.shape}: has room for {own.measured.budget} tokens at once, not train.token_budget"
            elif own.measured and own.measured.full > own.have:
                yield (
                    f"{own.shape}: needs {format_bytes(own.measured.full)} with train.token_budget at once, and has "
                    f"{format_bytes(own.have)}; lower it"
                )
        if self.left_out:
            yield f"{self.left_out} more shapes were not tried: none of them is excluded, and the mean stands for them"

    def epoch(self, values: Values | None = None) -> float:
        """Seconds of an epoch, of a trial with these values or of one that is drawn."""
        known = [own for own in self.tried if own.fits and own.measured]
        like = [] if values is None else [own for own in self._alike(values) if own in known]
        found = like or known
        return sum(own.epoch * own.shape.weight for own in found) / (sum(own.shape.weight for own in found) or 1)

    def forecast(self, entries: Sequence[TrialRecord], points: Sequence[Values], slots: int) -> Forecast:
        """What the trials that are left will take.

        Args:
            entries: of the ledger.
            points: that no trial has taken yet.
            slots: trials at a time.
        """
        search, epochs = self.config.search, self.config.train.epochs
        running = [entry for entry in entries if entry.state == "RUNNING"]
        work = [self.epoch(own.params) * (horizon(self.config, own.params) - len(own.curve)) for own in running]
        new, each = max(0, search.trials - len(entries)), search.mean_epochs(epochs)
        each *= search.expected_share(epochs, search.trials)
        work += [self.epoch(values) * each for values in [*points[:new], *[None] * (new - len(points[:new]))]]
        start = statistics.median([own.build for own in self.tried]) if self.tried else 0.0
        ends = [START] * max(1, min(slots, len(work)))
        for seconds in work:
            heapq.heapreplace(ends, ends[0] + start + seconds)
        return Forecast(search.trials, device_seconds(entries), sum(work), max(ends))


def told(config: Config, said: Forecast, slots: int) -> str:
    """A forecast in a line."""
    at_once = f"{slots} trial{'s' if slots > 1 else ''} at a time"
    return f"plan: about {format_duration(said.seconds)} ({at_once}), {format_device_hours(config, said.work)}"


def make(config: ResolvedConfig, cache: Path, folder: Path | None, nodes: Nodes, slots: int, say: Say) -> Plan:
    """Try all shapes, but for those that were tried before.

    Args:
        config: of the sweep.
        cache: of what trials share.
        folder: of the sweep, where the results are kept; None: nothing is written, and Ray is not needed.
        nodes: on which trials run.
        slots: trials at a time.
        say: shows a line to people.

    Raises:
        UserError: no shape fits.
        ClusterError: the cluster went away.
    """
    started = time.monotonic()
    found, left_out = shapes(config)
    tried = _try_all(found, cache, folder, nodes, slots)
    if not all(own.fits for own in tried):  # the numbers between the largest and the least one may
        found, left_out = shapes(config, whole=True)
        tried = _try_all(found, cache, folder, nodes, slots)
    plan = Plan(config, tried, left_out)
    excluded = plan.excluded()
    if folder is not None:
        forecast.write(folder, excluded=excluded)
    count = f"{len(tried)} shape{'s' if len(tried) > 1 else ''}"
    say(f"plan: dry steps of {count} of trials in {time.monotonic() - started:.1f} s")
    for line in [*excluded, *plan.notes()]:
        say(f"plan: {line}")
    if tried and len(excluded) == len(tried) and not left_out:
        raise UserError(f"nothing that the search may draw fits into memory ({tried[0].full}); {memory.ADVICE}")
    return plan


def preview(config: ResolvedConfig, cache: Path, folder: Path) -> list[str]:
    """The plan in lines, without Ray and without writing anything; of large models, only what will be tried.

    Raises:
        UserError: no shape fits.
    """
    found, _ = shapes(config)
    if not is_small(found):
        return [f"plan: dry steps of {len(found)} shapes of trials say how long it takes, when the sweep starts"]
    entries, points = list[TrialRecord](), config.search.points
    if has_study(folder, config):
        study = StudyStore.read(folder, config)
        entries, points = study.trials(), study.points_left()
    left = config.search.trials - sum(entry.state != "RUNNING" for entry in entries)
    nodes, said = [{"CPU": float(os.cpu_count() or 1)}], list[str]()
    slots = count_slots(config, nodes, left)
    plan = make(config, cache, None, nodes, slots, said.append)
    live = any(need.missing for need in frozen.needs(config, cache))
    line = told(config, plan.forecast(entries, points, slots), slots)
    return [*said, f"{line}; less once the frozen passes are done" if live else line]


def is_small(found: Iterable[TrialProfile]) -> bool:
    """Whether dry steps are made in this process."""
    configs = {own.config.model.llm.path + own.config.model.encoder.path: own.config for own in found}
    sizes = [sum(parameter.numel() for parameter in skeleton(own).parameters()) for own in configs.values()]
    return max(sizes, default=0) <= SMALL and all(own.resources.device == "cpu" for own in configs.values())


def _try_all(
    found: list[TrialProfile], cache: Path, folder: Path | None, nodes: Nodes, slots: int
) -> list[ProfileResult]:
    """Try the shapes; each result is kept as soon as it is there."""
    read = [frozen.folders_for(own.config, cache) for own in found]
    keys = [_key(own, folders, nodes) for own, folders in zip(found, read, strict=True)]
    known: dict[str, Said] = {} if folder is None else forecast.read(folder).get("steps", {})
    new = {key: (found[place].config, read[place]) for place, key in enumerate(keys) if key not in known}
    run = _here if folder is None or is_small(found) else _on_ray
    for key, said in run(new):
        known[key] = said
        if folder is not None:
            forecast.write(folder, steps=known)
    return [_judged(own, known[key], nodes, slots) for own, key in zip(found, keys, strict=True)]


def _judged(shape: TrialProfile, said: Said, nodes: Nodes, slots: int) -> ProfileResult:
    measured = Measured(**said["measured"]) if "measured" in said else None
    have, full = int(said.get("capacity", 0) * memory_share(shape.config, nodes, slots)), said.get("full", "")
    if measured and measured.least > have:
        full = f"needs {format_bytes(measured.least)} with one example at a time, and has {format_bytes(have)}"
    return ProfileResult(shape, measured, said.get("build", 0.0), have, full, said.get("trouble", ""))


def _key(shape: TrialProfile, folders: Mapping[str, str | None], nodes: Nodes) -> str:
    """Names what the dry steps of a shape depend on."""
    config = shape.config
    kinds = sorted({repr(sorted(_lasting(node).items())) for node in nodes})
    trial = config.model_dump(mode="json", exclude={"name": True, "search": True, "storage": True, "seed": True})
    content = [trial, sorted(map(bool, folders.values())), kinds, open_shards(config).fingerprint, code_version()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _lasting(node: Mapping[str, float]) -> dict[str, float]:
    """The resources of a node that are the same tomorrow: its free memory is not."""
    return {name: node[name] for name in node if name in ("CPU", "GPU") or name.startswith("accelerator")}


Work = Mapping[str, tuple[ResolvedConfig, dict[str, str | None]]]


def _here(work: Work) -> Iterator[tuple[str, Said]]:
    for key, (config, folders) in work.items():
        yield key, dry_steps(config, folders)


def _on_ray(work: Work) -> Iterator[tuple[str, Said]]:
    """As the trials will run: on nodes that have what a worker needs, in processes that may die of it."""
    import ray

    died = []
    try:
        for key, said in _tasks(work):
            if said is None:
                died.append(key)
            else:
                yield key, said
        for key in died:  # once more, alone: another one may have taken its memory
            for _, said in _tasks({key: work[key]}):
                yield key, said or {"full": "its dry steps ended their process, also alone"}
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the dry steps were lost ({reason(error)}); the same command goes on") from None


def _tasks(work: Work) -> "Iterator[tuple[str, Said | None]]":
    """What the dry steps say, in the order in which they end; None where their process died."""
    import ray

    waiting = {}
    for key, (config, folders) in work.items():
        need = worker_resources(config)
        # A GPU that trials share is one shape's alone: another's must not be the reason why there is no room.
        own = {"num_cpus": need["CPU"], "num_gpus": math.ceil(need.get("GPU", 0))}
        waiting[ray.remote(dry_steps).options(max_retries=0, **own).remote(config, folders)] = key
    while waiting:
        [ready], _ = ray.wait(list(waiting))
        key = waiting.pop(ready)
        try:
            yield key, ray.get(ready)
        except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError):
            yield key, None


def dry_steps(config: ResolvedConfig, folders: Mapping[str, str | None]) -> Said:
    """Make the dry steps of a trial, in this process.

    Args:
        config: of the trial.
        folders: what it reads, by kind; see `frozen.folders_for`.

    Returns:
        `measured`, `build` (seconds) and `capacity` (bytes of the device); `full`, why there was not enough memory; or
        `trouble`, what else was wrong.
    """
    device, started = config.resources.device, time.monotonic()
    peak, capacity = memory.Peak(device), memory.capacity(device)
    read = {kind: None if place is None else Path(place) for kind, place in folders.items()}
    try:
        model, data = build(config, "local", ("train", "val"), device, **read)
        took = time.monotonic() - started
        found = dryrun.measure(model, data, config.train, config.tasks, config.seed, config.resources.workers, peak)
    except memory.OutOfMemoryError as error:
        return {"full": reason(error)}
    except UserError as error:  # its trials say so themselves
        return {"trouble": reason(error)}
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not memory.is_out_of_memory(error):
            raise
        return {"full": "out of memory before the first step"}
    return {"measured": asdict(found), "build": took, "capacity": capacity}
