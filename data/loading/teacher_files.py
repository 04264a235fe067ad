"""What the teacher of a distillation makes of transcripts, in files (see `data.frozen`) named by the tokens it reads.

So other labels, splits, histories or prompts compute what they change and nothing else, and whatever reads the same
tokens (trials, sweeps, corpora) may share a folder.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.loading import array_files as frozen
from data.loading.array_files import Files, Part, named, runs
from data.loading.tasks import Item
from data.shards.dataset import Shards

PART_TOKENS = 2**18  # read for a file, which is what a kill may lose: minutes of a small LLM on a CPU
LAYOUT = {"ids": "<i4", "log_probs": "<f4"}  # [P, K] the likeliest tokens; [P, K + 1] theirs, and that of all others
Taught = tuple[np.ndarray, np.ndarray]  # those of an item


@dataclass(frozen=True, slots=True, eq=False)
class TeacherLogits:
    """What a teacher reads for an item, and where it predicts."""

    ids: np.ndarray  # int32, tokens of the transcript and of the answer but for its last target
    predicted: int  # the last so many positions

    @property
    def digest(self) -> str:
        """Equal for lessons that are read alike."""
        said = self.predicted.to_bytes(4, "little") + self.ids.astype("<i4").tobytes()
        return hashlib.sha256(said).hexdigest()


def parts(shards: Shards, lessons: Mapping[Item, TeacherLogits]) -> list[Part[Item]]:
    """The files that hold what is made of the lessons: of a task and a shard, as both may come and go by themselves."""
    shard = shards.columns["shard"]
    sized = ((item, (item[0], shard[item[1]]), len(lesson.ids)) for item, lesson in lessons.items())
    found = []
    for own in runs(sized, PART_TOKENS):
        read = [lessons[item] for item in own]
        found.append(named("teacher", " ".join(one.digest for one in read), own, [len(one.ids) for one in read]))
    return found


def write(folder: Path, part: Part[Item], taught: Iterable[Taught]) -> int:
    """Write what was made of a part's lessons; see `frozen.write`."""
    return frozen.write(folder, part, LAYOUT, taught)


class TeacherFiles(Files[Item]):
    """What the teacher makes of the training items.

    Args:
        folder: of the key.
        parts: the files.

    Raises:
        StorageError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, parts: Sequence[Part[Item]]) -> None:
        super().__init__(folder, parts, LAYOUT)

    def read(self, item: Item) -> Taught | None:
        """Of an item, not copies; None for one that is not trained on."""
        if item not in self.places:
            return None
        ids, log_probs = self.arrays(item)
        return ids, log_probs
