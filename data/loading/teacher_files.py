"""Cached logits of a distillation's teacher: the files of the training items, and their reader.

A file is named by a hash of the tokens that the teacher reads (see `cached_arrays`), so other labels, splits, histories
or prompts compute only what they change, and trials, sweeps and corpora with the same tokens may share a folder.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.loading.cached_arrays import CacheFile, CacheReader, cache_file, split_into_files
from data.loading.tasks import Item
from data.shards.dataset import Shards

if TYPE_CHECKING:
    from torch import Tensor

FILE_TOKENS = 2**18  # largest input of a file, which is what a kill may lose: minutes of a small LLM on a CPU
LAYOUT = {"ids": "<i4", "log_probs": "<f4"}  # the fields of `TeacherLogits`


class TeacherLogits(NamedTuple):
    """The largest logits of a teacher at P predicted tokens, normalised."""

    ids: "np.ndarray | Tensor"  # int32 [P, K]: the most probable tokens
    log_probs: "np.ndarray | Tensor"  # float32 [P, K + 1]: their log-probabilities, then that of all others


@dataclass(frozen=True, slots=True, eq=False)
class TeacherInput:
    """What a teacher reads for an item, and how many tokens it predicts."""

    ids: np.ndarray  # int32: tokens of the transcript and of the answer but for its last target
    predicted: int  # the number of last positions that predict

    @property
    def digest(self) -> str:
        """Return a hash that is equal for inputs with equal logits."""
        content = self.predicted.to_bytes(4, "little") + self.ids.astype("<i4").tobytes()
        return hashlib.sha256(content).hexdigest()


def teacher_files(shards: Shards, inputs: Mapping[Item, TeacherInput]) -> list[CacheFile[Item]]:
    """Return the files with the logits for all inputs.

    Each file belongs to one task and one shard, because tasks and shards may be added or removed independently.
    """
    shard = shards.columns["shard"]
    sized = ((item, (item[0], shard[item[1]]), len(read.ids)) for item, read in inputs.items())
    return [
        cache_file(
            "teacher",
            " ".join(inputs[item].digest for item in items),
            items,
            [len(inputs[item].ids) for item in items],
        )
        for items in split_into_files(sized, FILE_TOKENS)
    ]


class TeacherReader(CacheReader[Item]):
    """Reads the cached logits of a teacher.

    Args:
        folder: the folder of the cache key.
        files: see `teacher_files`.

    Raises:
        StorageError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, files: Sequence[CacheFile[Item]]) -> None:
        super().__init__(folder, files, LAYOUT)

    def read(self, item: Item) -> TeacherLogits | None:
        """Return views of the logits for an item; None for an item that is not trained on."""
        return TeacherLogits(*self.arrays(item)) if item in self.positions else None
