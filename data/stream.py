"""The two sources of batches behind one seam: Ray Data, and memory-mapped shards. Both yield identical examples."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data.config import DataConfig
from data.examples import Example, from_arrow, read_example, to_arrow
from data.shards import Shards
from data.tasks import Item

Batches = Sequence[Sequence[Item]]
Source = Callable[[Batches], Iterator[list[Example]]]

STEPS_PER_TASK = 16  # batches a Ray read task emits: few enough to start fast, enough to pay for the task
READ_TASKS = 1  # at a time and worker: tasks that ask for no CPU would otherwise start a process each
PREFETCH = 4  # batches fetched ahead of the training step


def local_source(shards: Shards, config: DataConfig, sound: bool) -> Source:
    """Read from the memory-mapped shards in this process: for shards on the node's own disk, and without Ray."""

    def read(batches: Batches) -> Iterator[list[Example]]:
        for batch in batches:
            yield [read_example(shards, item, config, sound) for item in batch]

    return read


def ray_source(shards: Shards, config: DataConfig, sound: bool) -> Source:
    """Read through Ray Data: tasks on any node read the shards, batches arrive ahead of the step that needs them.

    The batch plan itself is the data source: one row of the dataset is one batch, so order, batch borders and resume
    are exact. The tasks ask for no CPU: otherwise workers that hold all CPUs would wait for them for ever.
    """

    def read(batches: Batches) -> Iterator[list[Example]]:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.execution_options.verbose_progress = False
        source = _plan_datasource(shards, config, sound, batches)
        dataset = ray.data.read_datasource(source, num_cpus=0, concurrency=READ_TASKS)
        for table in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=PREFETCH):
            yield from from_arrow(table)

    return read


def _plan_datasource(shards: Shards, config: DataConfig, sound: bool, batches: Batches) -> Any:
    """A Ray `Datasource` whose read tasks each emit a run of consecutive batches, one row a batch."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class PlanDatasource(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            return [_task(batches[first : first + STEPS_PER_TASK]) for first in range(0, len(batches), STEPS_PER_TASK)]

    def _task(part: Batches) -> ReadTask:
        def read() -> Iterator[Any]:
            yield to_arrow([[read_example(shards, item, config, sound) for item in batch] for batch in part])

        metadata = BlockMetadata(num_rows=len(part), size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(read, metadata)

    return PlanDatasource()


SOURCES: dict[str, Callable[[Shards, DataConfig, bool], Source]] = {"local": local_source, "ray": ray_source}
