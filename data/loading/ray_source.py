"""Read the clips of a batch plan, and run other jobs, with Ray Data."""

import contextlib
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from data.compat import pausing_callback
from data.config import DataConfig
from data.errors import DataError, UserError
from data.loading.augment import AugmentSeed
from data.loading.examples import clips_from_arrow, clips_to_arrow, read_example, read_item_clip
from data.loading.sources import Batch, Batches, Source, fetch_pool, local_source
from data.shards.dataset import Shards

if TYPE_CHECKING:
    from ray.data import Datasource, ReadTask

FIRST_STEPS = 8  # batches of the first read task: few, so that training starts early
STEPS_PER_TASK = 48  # batches of the other read tasks: many, because a task has a fixed cost
PAUSE, SHORT_PAUSE = 0.02, 0.005  # seconds between two steps of Ray Data's control loop; short while a batch is awaited
READ_TASKS = 1  # concurrent tasks per worker; tasks that request no CPU would otherwise start a process each


def ray_source(shards: Shards, config: DataConfig, with_audio: bool) -> Source:
    """Read clips with Ray Data: tasks on any node read them ahead of the step that needs them.

    The rows of the dataset are the clips in the order of the batch plan, so batches and resume are exact. The text
    comes from the index, which every worker has. The tasks request no CPU: otherwise they would wait for workers that
    hold all CPUs, which wait for the tasks.
    """
    if not with_audio:
        return local_source(shards, config, with_audio)

    def read(batches: Batches, seed: AugmentSeed | None = None) -> Generator[Batch, None, None]:
        tasks = [_read_task(shards, config, part, seed) for part in _parts(batches)]
        with contextlib.closing(_clips(tasks)) as clips:
            for batch in batches:
                yield [read_example(shards, item, config, with_audio=False, pcm=next(clips)) for item in batch]

    return read


def _clips(tasks: "list[ReadTask]") -> Generator[np.ndarray | None, None, None]:
    """Yield the clips of read tasks in their order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    context.custom_execution_callback_classes = [pausing_callback(_pause)]
    context.memory_usage_poll_interval_s = None  # would be a thread in every task
    # One block per task: otherwise Ray cuts each block into single rows, which costs three times as much as reading.
    dataset = ray.data.read_datasource(
        _datasource(tasks), num_cpus=0, concurrency=READ_TASKS, override_num_blocks=len(tasks)
    )
    # Whole blocks: cutting them into batches here is cheaper than in the threads of Ray.
    tables = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    try:
        while (table := _next(tables)) is not None:
            yield from clips_from_arrow(table)
    except Exception as error:
        raise _unwrapped(error) from None


_WAITING: set[int] = set()  # threads of this process that wait for a block


def _next(tables: Iterator[pa.Table]) -> pa.Table | None:
    _WAITING.add(threading.get_ident())
    try:
        return next(tables, None)
    finally:
        _WAITING.discard(threading.get_ident())


def _pause() -> float:
    return SHORT_PAUSE if _WAITING else PAUSE


def _parts(batches: Batches) -> list[Batches]:
    """Return the batches of each read task."""
    borders = [0, *range(FIRST_STEPS, len(batches), STEPS_PER_TASK), len(batches)]
    return [batches[first:end] for first, end in pairwise(borders)]


def _unwrapped(error: Exception) -> Exception:
    """Return the UserError that a task raised, without the text that Ray appends to it; other errors as they are."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, UserError):
        return error
    cause.args = (str(cause).partition("\nFailed to apply UDF transform")[0], *cause.args[1:])
    return cause


def _datasource(tasks: "list[ReadTask]") -> "Datasource":
    """Return a Ray Data source that consists of these read tasks."""
    from ray.data import Datasource

    class Tasks(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> "list[ReadTask]":
            return tasks

    return Tasks()


def _task(read: Callable[[], pa.Table], rows: int) -> "ReadTask":
    from ray.data import ReadTask
    from ray.data.block import BlockMetadata

    metadata = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
    return ReadTask(lambda: iter([read()]), metadata)


def _read_task(shards: Shards, config: DataConfig, batches: Batches, seed: AugmentSeed | None) -> "ReadTask":
    """Return a task that reads the clips of consecutive batches into one table."""
    folder, fold, index = shards.folder, shards.fold, shards.manifest.index

    def read() -> pa.Table:
        opened = _open(folder, fold, index)
        at_once = map if opened.store.local is not None else fetch_pool().map
        items = itertools.chain.from_iterable(batches)
        return clips_to_arrow(list(at_once(lambda item: read_item_clip(opened, item, config, seed), items)), _memory)

    return _task(read, sum(map(len, batches)))


_MEMORY = [np.empty(0, "<i2")]


def _memory(samples: int) -> np.ndarray:
    """Return memory that all read tasks of a process share, because fresh pages cost more than copying into them.

    Ray copies the table of a task into its object store before the task ends, and a process runs one task at a time.
    """
    if len(_MEMORY[0]) < samples:
        _MEMORY[0] = np.empty(samples, "<i2")
    return _MEMORY[0][:samples]


@functools.lru_cache(maxsize=2)
def _open(folder: Path | str, fold: int, index: str) -> Shards:
    """Open a corpus once for all read tasks of a process.

    Raises:
        DataError: the corpus was prepared again since the trial opened it, so its rows may differ.
    """
    shards = Shards(folder, fold)
    if shards.manifest.index != index:
        raise DataError(f"{folder}: the corpus was changed while a trial reads it; start the sweep again")
    return shards


def ray_jobs(jobs: Sequence[Callable[[], pa.Table]], cpus: float = 1, gpus: float = 0) -> Iterator[pa.Table]:
    """Run jobs as read tasks of Ray Data, on any node that sees the files that they read and write.

    Args:
        jobs: each returns a table of one row.
        cpus: CPUs of a job.
        gpus: GPUs of a job.

    Raises:
        UserError: a job raised it.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_datasource(
        _datasource([_task(job, rows=1) for job in jobs]),
        num_cpus=cpus,
        num_gpus=gpus or None,
        override_num_blocks=len(jobs),
    )
    try:
        yield from dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
    except Exception as error:
        raise _unwrapped(error) from None
