"""The feature cache of a sweep: what frozen models compute from a corpus, computed once before the trials start.

search space ─► requests of the trials that may be drawn ─► missing files ─► jobs of workers ─► <cache>/<kind>/<key>/

There are two kinds, encoder features and teacher logits (see `CacheKind`). A trial whose files all exist reads them;
every other trial computes the numbers itself, with the same bits.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from data.errors import StorageError
from data.formats import format_bytes, format_duration
from data.loading.cached_arrays import ABOUT, CacheFolders, CacheJob
from data.shards.store import LOCK, Store
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.config.space import Axis, Value, Values
from sweep.execution.job import RETRIES
from sweep.execution.joined_cluster import ClusterError
from sweep.execution.tasks import TaskQueue
from sweep.preflight.cache_kinds.base import AnyRequest
from sweep.preflight.cache_kinds.encoder_features import EncoderFeatures
from sweep.preflight.cache_kinds.teacher_logits import TeacherLogitsKind
from sweep.preflight.checks import building_in_turns
from sweep.search.candidates import Options, candidates, resolve_candidate
from sweep.search.stopping import total_trials

ENCODER_FEATURES, TEACHER_LOGITS = EncoderFeatures(), TeacherLogitsKind()
MAX_COMBINATIONS = 64  # of the values of a kind's axes
MAX_INTEGERS = 8  # of a range
SMALL_WORK = 2e11  # positions times parameters: about ten seconds of one CPU
TASKS = 4  # of a worker group for one forward pass: fewer would leave groups without work at its end
LOCK_SECONDS = 6 * 3600.0  # that another sweep may compute the same files
PROGRESS_SECONDS = 10.0  # between two progress lines
# Settings of which only the sign matters: whether they are 0.
SIGN_ONLY = (
    "tasks.",
    "train.losses.distillation",
    "train.losses.hidden",
    "model.encoder.dropout",
    "model.encoder.spec_augment",
    "model.encoder.lora.rank",
)
Log = Callable[[str], None]
AnyJob = CacheJob[Any, Any]
Compute = Callable[[Sequence[AnyJob]], Iterator[int]]


class WeightedRequest(NamedTuple):
    """A request, and how much of the sweep makes it."""

    request: AnyRequest
    share: float  # of the trials that may be drawn, as if all values were drawn equally often


def cache_folder(config: Config, sweep_folder: Path) -> Path:
    """Return the cache of a sweep: by default beside its folder, which all nodes see."""
    return sweep_folder.absolute().parent / (config.storage.cache or "cache")


def cache_requests(config: ResolvedConfig, cache: Path) -> list[WeightedRequest]:
    """Return what the trials of a sweep may read. Trials with a value from a continuous axis compute it themselves."""
    shares: dict[Hashable, WeightedRequest] = {}
    space = config.search.space
    for kind in (ENCODER_FEATURES, TEACHER_LOGITS):
        options = {key: _options(key, axis) for key, axis in space.items() if key.startswith(kind.axes)}
        combinations = [
            combination
            for point in _only_points(config)
            for combination in candidates(config, _with_point(options, point), MAX_COMBINATIONS)
        ]
        for combination in combinations:
            trial = resolve_candidate(config, combination.values)
            found: list[AnyRequest] = [] if trial is None else [*kind.requests(trial, cache, config)]
            deepest = max(found, key=lambda request: request.kind.work(request, 1), default=None)
            for request in found:
                name = kind.identity(request)
                first, share = shares.get(name, WeightedRequest(request, 0.0))
                # One pass gives a trial all that it reads, so only the deepest request counts.
                share += (request is deepest) / len(combinations)
                shares[name] = WeightedRequest(kind.merged(first, request), share)
    return list(shares.values())


def _only_points(config: Config) -> Sequence[Values]:
    """Return the points of a search that draws nothing else; otherwise one that leaves all axes open."""
    search = config.search
    return search.points[: search.trials] if search.trials <= len(search.points) else [{}]


def _with_point(options: Options, point: Values) -> Options:
    """Return the options of the trials that take a point."""
    return {key: [point[key]] if key in point else values for key, values in options.items()}


def _options(key: str, axis: Axis) -> Sequence[Value]:
    """Return the values of an axis that are worth telling apart; none of a continuous axis."""
    if key.startswith(SIGN_ONLY):
        return axis.by_sign()
    if axis.choices is not None:
        return list(axis.choices)
    low, high, step = axis.low, axis.high, axis.step or 1
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
        return list(range(low, high + 1, step))[:MAX_INTEGERS]
    return []


def cached_folders(config: ResolvedConfig, cache: Path) -> CacheFolders:
    """Return the folders that a trial reads; none of a kind that it does not use or whose files are not complete."""
    features = ENCODER_FEATURES.requests(config, cache)
    logits = [request.folder for request in TEACHER_LOGITS.requests(config, cache) if not request.missing]
    complete = not any(request.missing for request in features)
    return CacheFolders(tuple(request.folder for request in features) if complete else (), *logits)


def mark_used(folders: CacheFolders) -> None:
    """Record that a trial reads these folders now: `sweep cache prune` deletes what was not used for long."""
    for folder in filter(None, (*folders.features, folders.teacher_logits)):
        (folder / ABOUT).touch()


def describe(requests: Sequence[AnyRequest]) -> Iterator[str]:
    """Yield lines about what is computed, its size on the disk, and how much of it is missing."""
    topics: dict[Hashable, list[AnyRequest]] = {}
    for request in requests:
        topics.setdefault(request.kind.topic(request.key), []).append(request)
    for group in topics.values():
        first, kind = group[0], group[0].kind
        files, missing = sum(len(r.files) for r in group), sum(len(r.missing) for r in group)
        state = f"{missing} of {files} files to compute" if missing else "already computed"
        size = kind.format_size(max(sum(file.size for file in request.files) for request in group))
        disk = format_bytes(sum(kind.bytes(request, request.files) for request in group))
        named = kind.describe([request.key for request in group], first.config)
        yield f"feature cache: {named}: {size}, {disk}, shared by all trials; {state}"


def preview(config: ResolvedConfig, cache: Path, trials: int) -> Iterator[str]:
    """Yield lines about what `Precomputation` would do, without computing anything; see there for the arguments."""
    for group in _forward_passes(config, cache):
        yield from describe([request for request, _ in group])
        lacking = [weighted for weighted in group if weighted.request.missing]
        if lacking and (reason_not := _why_skipped(lacking, _epochs(config, trials))):
            yield reason_not


class Precomputation:
    """The missing files of a sweep's feature cache, computed unless that takes longer than the trials save by it.

    A kill loses the files that were in progress.

    Args:
        config: of the sweep.
        cache: folder of the cache.
        log: shows a line to the user.
        trials: the number of trials that are left; None: all.
        compute: computes files and yields the input size of each; None: in this process.

    Attributes:
        pending: the folders that still lack files. The caller of `steps` removes those that are complete.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        cache: Path,
        log: Log,
        trials: int | None = None,
        compute: Compute | None = None,
    ) -> None:
        self.config, self.cache, self.log = config, cache, log
        self.compute = compute or compute_here
        self.epochs = _epochs(config, trials)
        self.groups: list[list[WeightedRequest]] = []
        for group in _forward_passes(config, cache):
            missing = [weighted for weighted in group if weighted.request.missing]
            if missing and (reason_not := _why_skipped(missing, self.epochs)):
                log(reason_not)
            else:
                self.groups.append(group)
        # The pass that saves most for its cost comes first; it is 0 for one that lacks nothing.
        self.groups.sort(key=lambda group: -_repeats(group, self.epochs))
        self.pending = {request.folder for group in self.groups for request, _ in group if request.missing}

    def awaits(self, config: ResolvedConfig, pending: Collection[Path]) -> bool:
        """Return whether a trial reads from one of some folders."""
        kinds = (ENCODER_FEATURES, TEACHER_LOGITS) if pending else ()
        return any(self.cache / kind.name / key.key in pending for kind in kinds for key in kind.keys(config))

    def steps(self) -> Iterator[set[Path]]:
        """Compute the files, those of one forward pass in each step; yield the folders that are complete after it.

        Raises:
            StorageError: the disk has no room for them.
            UserError: a file cannot be computed.
        """
        for group in self.groups:
            with contextlib.ExitStack() as locks:
                lacking = []
                # The order of the locks is the same in all sweeps: another one may compute the same requests.
                for request, share in sorted(group, key=lambda weighted: weighted.request.folder):
                    request.folder.mkdir(parents=True, exist_ok=True)
                    with contextlib.ExitStack() as lock:
                        lock.enter_context(_locked(request, self.log))
                        Store(request.folder).write(ABOUT, json.dumps(asdict(request.key), indent=1).encode())
                        if request.missing:
                            lacking.append(WeightedRequest(request, share))
                            locks.enter_context(lock.pop_all())  # a complete request is unlocked at once
                if lacking:
                    _compute(lacking, self.epochs, self.log, self.compute)
            if folders := self.pending & {request.folder for request, _ in group}:
                yield folders


def precompute(config: ResolvedConfig, cache: Path, log: Log, trials: int | None = None) -> None:
    """Compute the missing files of a sweep in this process; see `Precomputation`."""
    for _ in Precomputation(config, cache, log, trials).steps():
        pass


def compute_here(jobs: Sequence[AnyJob]) -> Iterator[int]:
    """Compute files in this process; yield the input size of each."""
    for job in jobs:
        with building_in_turns():
            job()
        yield job.file.size


def compute_on_workers(queue: TaskQueue, groups: int) -> Compute:
    """Return a function that computes files in the workers of a sweep, several files in each task.

    Args:
        queue: of the sweep.
        groups: the number of worker groups.
    """

    def compute(jobs: Sequence[AnyJob]) -> Iterator[int]:
        share = sum(job.file.size for job in jobs) / (TASKS * groups)
        tasks, size = list[list[AnyJob]](), share
        for job in jobs:
            if size >= share:
                tasks.append([])
                size = 0
            tasks[-1].append(job)
            size += job.file.size
        offers = [lambda task=task: task for task in tasks]
        for index, results in queue.run(offers, at_once=groups, restarts=RETRIES, temporary=True):
            if results is None:
                raise ClusterError(
                    "computing the feature cache failed (its workers died too often); rerun the same command to resume"
                )
            yield sum(job.file.size for job in tasks[index])

    return compute


def _forward_passes(config: ResolvedConfig, cache: Path) -> list[list[WeightedRequest]]:
    """Return the requests of a sweep, those of one forward pass together."""
    groups: dict[str, list[WeightedRequest]] = {}
    for weighted in cache_requests(config, cache):
        groups.setdefault(weighted.request.kind.pass_key(weighted.request), []).append(weighted)
    return list(groups.values())


def _epochs(config: Config, trials: int | None) -> float:
    """Return the epochs that the trials of a sweep train for together; see `Precomputation`."""
    search, epochs = config.search, config.train.epochs
    left = total_trials(config, []) if trials is None else trials
    return left * search.mean_epochs(epochs) * search.expected_share(epochs, search.trials)


def _repeats(group: Sequence[WeightedRequest], total_epochs: float) -> float:
    """Return how often the trials would compute what a forward pass computes once.

    Without the cache, each trial computes its request in each epoch. A pass costs as much as the deepest request that
    lacks a file; it is 0 for a pass without any.
    """
    files = {file.name: file for request, _ in group for file in request.missing}
    cost = sum(max(r.kind.work(r, file.size) for r, _ in group if r.lacks(file)) for file in files.values())
    epoch = sum(share * request.kind.work(request, request.kind.epoch_size(request)) for request, share in group)
    return total_epochs * epoch / cost if cost else 0.0


def _why_skipped(group: Sequence[WeightedRequest], total_epochs: float) -> str | None:
    """Return a line that says why the trials compute the numbers of a forward pass themselves; None if they need not.

    Args:
        group: requests that lack files.
        total_epochs: of all trials.
    """
    repeats = _repeats(group, total_epochs)
    if repeats >= 1:
        return None
    request = group[0].request
    return (
        f"feature cache: not computed: {request.kind.describe([request.key], request.config)} would cost more than it "
        f"saves, since the trials that are left need {100 * repeats:.0f} % of it; they compute it themselves"
    )


@contextlib.contextmanager
def _locked(request: AnyRequest, log: Log) -> Iterator[None]:
    """Lock a request; say so where another sweep computes it now, and wait for that sweep.

    Raises:
        StorageError: it holds the lock for longer than `LOCK_SECONDS`.
    """
    lock = FileLock(request.folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"feature cache: another sweep computes {request.folder}; waiting for it")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise StorageError(
                f"{request.folder / LOCK}: held by another process for {LOCK_SECONDS / 3600:.0f} h; end it and rerun "
                "the same command"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _compute(group: Sequence[WeightedRequest], total_epochs: float, log: Log, compute: Compute) -> None:
    """Compute requests of one forward pass, and log what it costs and saves."""
    aligned = group[0].request.kind.aligned([weighted.request for weighted in group])
    group = [WeightedRequest(request, weighted.share) for request, weighted in zip(aligned, group, strict=True)]
    group = [weighted for weighted in group if weighted.request.missing]
    if not group:
        return  # another sweep has computed the rest while this one waited for the locks
    requests = [weighted.request for weighted in group]
    for line in describe(requests):
        log(line)
    _check_free_space(requests)
    first = requests[0]
    kind, resources = first.kind, first.config.resources
    files = list({file.name: file for request in requests for file in request.missing}.values())
    jobs = kind.jobs(requests, files)
    # A pass over a file costs as much as the deepest request that lacks it.
    cost = sum(max(kind.work(request, file.size) for request in requests if request.lacks(file)) for file in files)
    size, done, repeats = sum(job.file.size for job in jobs), 0, _repeats(group, total_epochs)
    if cost <= SMALL_WORK and not resources.gpus_per_worker:  # the workers may still be starting
        compute = compute_here
    started = logged = time.monotonic()
    for computed in compute(jobs):
        done += computed
        now = time.monotonic()
        if now - logged >= PROGRESS_SECONDS and done < size:
            logged = now
            left = (now - started) * (size / done - 1)
            log(f"feature cache: {100 * done / size:.0f} %, about {format_duration(left)} left")
    taken = time.monotonic() - started
    saved = format_duration(max(0.0, taken * repeats - taken))
    computed_size = kind.format_size(sum(file.size for file in files))
    log(f"feature cache: {computed_size} computed in {taken:.1f} s, saves about {saved} of training")


def _check_free_space(requests: Sequence[AnyRequest]) -> None:
    """Raise a StorageError if the disk is too small for all missing files."""
    folder, size = requests[0].folder, sum(request.kind.bytes(request, request.missing) for request in requests)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"{folder}: the feature cache needs {format_bytes(size)} and {format_bytes(free)} are free; free some "
            "space (`sweep cache prune`), set storage.cache to another folder, or set storage.features=live"
        )
