"""Read the clips of a batch plan from memory-mapped shards."""

import functools
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

from data.config import DataConfig
from data.loading.augment import Draw
from data.loading.examples import read_example
from data.loading.prefetch import Batch, Batches, Source
from data.shards.dataset import Shards

FETCHES = 8  # clips fetched at a time from a store behind a URL, where each is a request


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
