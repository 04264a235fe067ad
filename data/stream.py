"""The two sources of batches behind one seam: Ray Data, and memory-mapped shards. Both yield identical examples.

Either is read by a thread (`Reading`), ahead of the training step that needs the batch.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa

from data.augment import Draw
from data.config import DataConfig
from data.errors import DataError, UserError
from data.examples import Example, from_arrow, heard_source, read_clip, read_example, to_arrow
from data.features import Features
from data.shards import Shards
from data.tasks import Item
from data.taught import TaughtFiles

Batches = Sequence[Sequence[Item]]
Batch = list[Example]
Source = Callable[[Batches, Draw | None], Generator[Batch, None, None]]  # None: as recorded

FIRST_STEPS = 8  # batches of the first read task: few, so that training can begin
STEPS_PER_TASK = 48  # of the others: many, to pay for the task
READ_TASKS = 1  # at a time and worker: tasks that ask for no CPU would otherwise start a process each
BURST = 8  # batches read in a row: to wake the thread for each costs as much as to read it
PREFETCH = 2 * BURST  # batches read ahead of the training step, at most
PAUSE, SHORT_PAUSE = 0.02, 0.005  # seconds between two steps of Ray Data's control loop; while a batch is missed
FETCHES = 8  # clips fetched at a time from a store behind a URL, where each is a request


class Reading:
    """Batches in their order, read ahead by a thread from the moment on that this is made. Iterate over it once.

    Args:
        read: makes the batches; runs in the thread.
        after: what is read first. This starts once that has been read, or is wanted itself.
    """

    def __init__(self, read: Callable[[], Generator[Batch, None, None]], after: "Reading | None" = None) -> None:
        self.waited = 0.0  # seconds for which the consumer was blocked
        self._over, self._taken = False, 0
        self._batches: SimpleQueue[Batch | BaseException | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # an entry for each burst that may be read
        for _ in range(PREFETCH // BURST):
            self._room.put(None)
        self._wanted, self._stop = threading.Event(), threading.Event()
        former = None if after is None else after.thread
        # The thread must not hold this object: one that nobody holds any longer is closed.
        own = (read, former, self._batches, self._room, self._wanted, self._stop)
        self.thread: threading.Thread = threading.Thread(target=_fill, args=own, daemon=True, name="reading")
        self.thread.start()

    @property
    def ended(self) -> bool:
        """Whether nothing more will be read."""
        return not self.thread.is_alive()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            Exception: what the reading raised, as it was.
        """
        if self._over:
            raise StopIteration
        self._wanted.set()
        started = time.monotonic()
        batch = self._batches.get()
        self.waited += time.monotonic() - started
        if isinstance(batch, list):
            self._taken += 1
            if self._taken % BURST == 0:
                self._room.put(None)
            return batch
        self._over = True
        raise StopIteration if batch is None else batch

    def close(self) -> None:
        """End the thread with the batch that it is reading."""
        self._over = True
        self._stop.set()
        self._room.put(None)  # the thread may be waiting for it

    __del__ = close


def _fill(
    read: Callable[[], Generator[Batch, None, None]],
    former: threading.Thread | None,
    batches: "SimpleQueue[Batch | BaseException | None]",
    room: "SimpleQueue[None]",
    wanted: threading.Event,
    stop: threading.Event,
) -> None:
    end: BaseException | None = None
    while former is not None and former.is_alive() and not wanted.is_set() and not stop.is_set():
        former.join(0.02)
    try:
        with contextlib.closing(read()) as source:
            for number in itertools.count():
                if number % BURST == 0:
                    room.get()
                if stop.is_set() or (batch := next(source, None)) is None:
                    break
                batches.put(batch)
    except BaseException as error:  # raised again where the batch is missed
        end = error
    batches.put(end)


def local_source(shards: Shards, config: DataConfig, sound: bool) -> Source:
    """Read from the shards in this process: memory-mapped on the node's own disk, or from a store; without Ray."""
    return functools.partial(_read, shards, config, sound)


def _read(
    shards: Shards, config: DataConfig, sound: bool, batches: Batches, draw: Draw | None = None
) -> Generator[Batch, None, None]:
    for batch in batches:
        if shards.store.local is not None:
            yield [read_example(shards, item, config, sound, draw) for item in batch]
        else:
            yield list(_requests().map(lambda item: read_example(shards, item, config, sound, draw), batch))


@functools.cache
def _requests() -> ThreadPoolExecutor:
    """Reads several clips at a time, where each is a request."""
    return ThreadPoolExecutor(FETCHES, "fetch")


def feature_source(shards: Shards, config: DataConfig, features: Features) -> Source:
    """Read what a frozen encoder, or its frozen layers, made of the clips: memory-mapped, without Ray."""

    def read(batches: Batches, draw: Draw | None = None) -> Generator[Batch, None, None]:
        for batch in batches:
            yield [_with_features(shards, item, config, features) for item in batch]

    return read


def _with_features(shards: Shards, item: Item, config: DataConfig, features: Features) -> Example:
    example, row = read_example(shards, item, config, sound=False), heard_source(shards, item, config)
    if row is None:
        return example
    return dataclasses.replace(example, features=features.read(row), n_samples=shards.columns["n_samples"][row])


def taught_source(source: Source, taught: TaughtFiles) -> Source:
    """The same examples, with what a distillation's teacher made of them."""

    def read(batches: Batches, draw: Draw | None = None) -> Generator[Batch, None, None]:
        with contextlib.closing(source(batches, draw)) as found:
            for batch, examples in zip(batches, found, strict=True):
                pairs = zip(examples, batch, strict=True)
                yield [dataclasses.replace(example, taught=taught.read(item)) for example, item in pairs]

    return read


def ray_source(shards: Shards, config: DataConfig, sound: bool) -> Source:
    """Hear through Ray Data: tasks on any node read the clips, which arrive ahead of the step that needs them.

    The batch plan itself is the data source: a row of the dataset is a clip, in the order of the plan, so batch borders
    and resume are exact. The words come from the index, which every worker has. The tasks ask for no CPU: otherwise
    workers that hold all CPUs would wait for them for ever.
    """
    if not sound:
        return local_source(shards, config, sound)

    def read(batches: Batches, draw: Draw | None = None) -> Generator[Batch, None, None]:
        clips = _clips(_plan_datasource(shards, config, batches, draw), len(_parts(batches)))
        with contextlib.closing(clips):
            for batch in batches:
                yield [read_example(shards, item, config, sound=False, pcm=next(clips)) for item in batch]

    return read


def _clips(source: Any, blocks: int) -> Generator[Any, None, None]:
    """The rows of a datasource. As many blocks as tasks: otherwise Ray cuts each into single rows, which costs three
    times as much as reading."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    context.custom_execution_callback_classes = [_pause_class()]
    context.memory_usage_poll_interval_s = None  # a thread in every task
    dataset = ray.data.read_datasource(source, num_cpus=0, concurrency=READ_TASKS, override_num_blocks=blocks)
    # Whole blocks: to cut them into batches here costs less than in Ray's threads.
    tables = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    try:
        while (table := _next(tables)) is not None:
            yield from from_arrow(table)
    except Exception as error:
        raise _unwrapped(error) from None


_WAITING: set[int] = set()  # threads of this process that miss a batch


def _next(tables: Iterator[Any]) -> Any:
    _WAITING.add(threading.get_ident())
    try:
        return next(tables, None)
    finally:
        _WAITING.discard(threading.get_ident())


@functools.cache
def _pause_class() -> type:
    """Slows Ray Data's control loop down, above all while no batch is missed: it would spin, and take a CPU from the
    training."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pause(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(SHORT_PAUSE if _WAITING else PAUSE)

    return Pause


def _parts(batches: Batches) -> list[Batches]:
    """What each read task reads."""
    borders = [0, *range(FIRST_STEPS, len(batches), STEPS_PER_TASK), len(batches)]
    return [batches[first:end] for first, end in pairwise(borders)]


def _unwrapped(error: Exception) -> Exception:
    """What a task raised, without what Ray puts around it and after its message."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, UserError):
        return error
    cause.args = (str(cause).partition("\nFailed to apply UDF transform")[0], *cause.args[1:])
    return cause


def _plan_datasource(shards: Shards, config: DataConfig, batches: Batches, draw: Draw | None = None) -> Any:
    """A Ray `Datasource` whose read tasks each emit the clips of a run of consecutive batches."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class PlanDatasource(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            return [_task(part) for part in _parts(batches)]

    place, fold, index = shards.folder, shards.fold, shards.manifest.index

    def _task(part: Batches) -> ReadTask:
        def read() -> Iterator[Any]:
            own = _kept(place, fold, index)
            at_once = map if own.store.local is not None else _requests().map
            items = itertools.chain.from_iterable(part)
            yield to_arrow(list(at_once(lambda item: read_clip(own, item, config, draw), items)), _memory)

        metadata = BlockMetadata(num_rows=sum(map(len, part)), size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(read, metadata)

    return PlanDatasource()


_MEMORY = [np.empty(0, "<i2")]


def _memory(samples: int) -> np.ndarray:
    """The same memory for each read task of a process: fresh pages cost more than what is copied into them.

    Ray has copied a task's table into its object store before the task ends, and a process has one task at a time.
    """
    if len(_MEMORY[0]) < samples:
        _MEMORY[0] = np.empty(samples, "<i2")
    return _MEMORY[0][:samples]


@functools.lru_cache(maxsize=2)
def _kept(place: Path | str, fold: int, index: str) -> Shards:
    """A corpus that stays open from one read task of a process to the next.

    Raises:
        DataError: it was prepared anew since the trial opened it: the rows would be others.
    """
    shards = Shards(place, fold)
    if shards.manifest.index != index:
        raise DataError(f"{place}: the corpus was changed while a trial reads it; start the sweep again")
    return shards


SOURCES: dict[str, Callable[[Shards, DataConfig, bool], Source]] = {"local": local_source, "ray": ray_source}


def ray_jobs(jobs: Sequence[Callable[[], pa.Table]], cpus: float = 1, gpus: float = 0) -> Iterator[pa.Table]:
    """Do work through Ray Data: each job is a read task, on any node that sees what it reads and writes.

    Args:
        jobs: each returns a table of one row.
        cpus: of a job.
        gpus: of a job.

    Raises:
        UserError: what a job raised.
    """
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class JobDatasource(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            return [_task(job) for job in jobs]

    def _task(job: Callable[[], pa.Table]) -> ReadTask:
        metadata = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(lambda: iter([job()]), metadata)

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_datasource(
        JobDatasource(), num_cpus=cpus, num_gpus=gpus or None, override_num_blocks=len(jobs)
    )
    try:
        yield from dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
    except Exception as error:
        raise _unwrapped(error) from None
