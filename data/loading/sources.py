"""Sources of batches: memory-mapped shards, cached features and cached teacher logits.

A source is a function that yields the examples of consecutive batches. `data.loading.ray_source` has the source that
reads with Ray Data; all sources yield identical examples. A `Prefetcher` runs a source in a thread.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from data.config import DataConfig
from data.loading.augment import AugmentSeed
from data.loading.examples import Example, audio_source_row, read_example
from data.loading.feature_files import FeatureReader
from data.loading.tasks import Item
from data.loading.teacher_files import TeacherReader
from data.shards.dataset import Shards

Batches = Sequence[Sequence[Item]]
Batch = list[Example]
Source = Callable[[Batches, AugmentSeed | None], Generator[Batch, None, None]]  # None: clips are not augmented
FETCHES = 8  # concurrent reads from a store behind a URL, where each clip is a request


def local_source(shards: Shards, config: DataConfig, with_audio: bool) -> Source:
    """Read shards in this process, memory-mapped on the disk of the node or from a store behind a URL, without Ray."""

    def read(batches: Batches, seed: AugmentSeed | None = None) -> Generator[Batch, None, None]:
        at_once = map if shards.store.local is not None else fetch_pool().map
        for batch in batches:
            yield list(at_once(lambda item: read_example(shards, item, config, with_audio, seed), batch))

    return read


@functools.cache
def fetch_pool() -> ThreadPoolExecutor:
    """Return the threads that read several clips of a store behind a URL at once."""
    return ThreadPoolExecutor(FETCHES, "fetch")


def feature_source(shards: Shards, config: DataConfig, readers: Sequence[FeatureReader]) -> Source:
    """Read cached features of a frozen encoder, or of its frozen layers, instead of clips."""

    def read_with_features(item: Item) -> Example:
        example, row = read_example(shards, item, config, with_audio=False), audio_source_row(shards, item, config)
        if row is None:
            return example
        features = tuple(reader.read(row) for reader in readers)
        return dataclasses.replace(example, features=features, n_samples=shards.columns["n_samples"][row])

    def read(batches: Batches, seed: AugmentSeed | None = None) -> Generator[Batch, None, None]:
        for batch in batches:
            yield [read_with_features(item) for item in batch]

    return read


def teacher_source(source: Source, teacher: TeacherReader) -> Source:
    """Add the cached logits of the teacher to the examples of another source."""

    def read(batches: Batches, seed: AugmentSeed | None = None) -> Generator[Batch, None, None]:
        with contextlib.closing(source(batches, seed)) as examples_of_batches:
            for batch, examples in zip(batches, examples_of_batches, strict=True):
                pairs = zip(examples, batch, strict=True)
                yield [dataclasses.replace(example, teacher_logits=teacher.read(item)) for example, item in pairs]

    return read
