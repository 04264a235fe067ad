"""Stream the clips of a batch plan with Ray Data."""

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.config import DataConfig
from data.errors import DataError, UserError
from data.loading.augment import Draw
from data.loading.examples import from_arrow, read_clip, read_example, to_arrow
from data.loading.local_source import _requests, local_source
from data.loading.prefetch import Batch, Batches, Source
from data.shards.dataset import Shards

FIRST_STEPS = 8  # batches of the first read task: few, so that training can begin
STEPS_PER_TASK = 48  # of the others: many, to pay for the task
PAUSE, SHORT_PAUSE = 0.02, 0.005  # seconds between two steps of Ray Data's control loop; while a batch is missed
READ_TASKS = 1  # at a time and worker: tasks that ask for no CPU would otherwise start a process each


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
