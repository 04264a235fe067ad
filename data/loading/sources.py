"""The two sources of batches behind one seam: Ray Data, and memory-mapped shards. Both yield identical examples.

Either is read by a thread (`Prefetcher`), ahead of the training step that needs the batch.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator

from data.config import DataConfig
from data.loading.augment import Draw
from data.loading.examples import Example, heard_source, read_example
from data.loading.feature_files import FeatureReader
from data.loading.local_source import local_source
from data.loading.prefetch import Batch, Batches, Source
from data.loading.ray_source import ray_source
from data.loading.tasks import Item
from data.loading.teacher_files import TeacherReader
from data.shards.dataset import Shards


def feature_source(shards: Shards, config: DataConfig, features: FeatureReader) -> Source:
    """Read what a frozen encoder, or its frozen layers, made of the clips: memory-mapped, without Ray."""

    def read(batches: Batches, draw: Draw | None = None) -> Generator[Batch, None, None]:
        for batch in batches:
            yield [_with_features(shards, item, config, features) for item in batch]

    return read


def _with_features(shards: Shards, item: Item, config: DataConfig, features: FeatureReader) -> Example:
    example, row = read_example(shards, item, config, sound=False), heard_source(shards, item, config)
    if row is None:
        return example
    return dataclasses.replace(example, features=features.read(row), n_samples=shards.columns["n_samples"][row])


def teacher_source(source: Source, logits: TeacherReader) -> Source:
    """Return a source of the same examples with the cached logits of a distillation's teacher."""

    def read(batches: Batches, draw: Draw | None = None) -> Generator[Batch, None, None]:
        with contextlib.closing(source(batches, draw)) as found:
            for batch, examples in zip(batches, found, strict=True):
                pairs = zip(examples, batch, strict=True)
                yield [dataclasses.replace(example, teacher_logits=logits.read(item)) for example, item in pairs]

    return read


SOURCES: dict[str, Callable[[Shards, DataConfig, bool], Source]] = {"local": local_source, "ray": ray_source}
