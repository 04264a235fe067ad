"""From items to examples: the dialogue that is read, the clip that is heard, the answer that is expected."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa

from data.config import DataConfig
from data.errors import MisfitError
from data.loading.augment import Draw, augmented, with_noise
from data.loading.tasks import TASKS, Item, answer, heard_row, last_read
from data.loading.teacher_files import TeacherLogits
from data.shards.dataset import Shards


@dataclass(frozen=True, slots=True)
class Example:
    """One item of a task as the model gets it."""

    id: str  # of the item's turn, or of the session that is rated
    task: str
    conversation: str
    speaker: str  # role of the item's turn
    answer: str
    subset: str | None
    turns: tuple[tuple[str, str], ...]  # (role, text), oldest first
    heard: int | None  # place in `turns` of the one that has a clip
    pcm: np.ndarray | None  # the clip, int16 mono at 16 kHz; None: read as text only, or by its features
    features: np.ndarray | None = None  # of a frozen encoder, float16 [T, D], in place of the clip
    n_samples: int = 0  # of the clip, where the features stand for it
    teacher_logits: TeacherLogits | None = None  # of a distillation's teacher


def read_example(
    shards: Shards,
    item: Item,
    config: DataConfig,
    sound: bool,
    draw: Draw | None = None,
    pcm: np.ndarray | None = None,
) -> Example:
    """The example of an item: the last `config.history` turns before the last one that may be read, and, if `sound`,
    the clip of the last turn that has one, however far back it is.

    Args:
        shards: the corpus.
        item: of a task.
        config: how it is read.
        sound: whether the clip is read.
        draw: in training, of the epoch: the clip is augmented. None: it is not.
        pcm: the clip, where it was read elsewhere.
    """
    columns, (name, row) = shards.columns, item
    task = TASKS[name]
    last, heard = last_read(task, row), heard_row(shards, task, row)
    first = max(shards.sessions[row][0], last - config.history)
    first = first if heard is None else min(first, heard)
    texts = columns["text"][first : last + 1]
    if config.last_text == "omitted":
        texts[(last if heard is None else heard) - first] = ""
    session = task.answer == "quality"
    if sound and heard is not None:
        pcm = clip_of(shards, _source(shards, heard, config), config, draw)
    return Example(
        id=columns["conversation" if session else "id"][row],
        task=name,
        conversation=columns["conversation"][row],
        speaker=columns["speaker"][row],
        answer=answer(shards, item),
        subset=columns["subset"][row] if task.answer == "label" and task.reads == "turn" else None,
        turns=tuple(zip(columns["speaker"][first : last + 1], texts, strict=True)),
        heard=None if heard is None else heard - first,
        pcm=pcm,
    )


def clip_samples(shards: Shards, item: Item, config: DataConfig) -> int:
    """Samples of the clip that is heard for an item, before augmentation; 0 without one. Needs no audio."""
    row = heard_source(shards, item, config)
    samples: int = 0 if row is None else shards.columns["n_samples"][row]
    return samples


def _source(shards: Shards, row: int, config: DataConfig) -> int:
    """The row whose clip is heard in place of a row's own.

    Raises:
        MisfitError: there is no other clip to shuffle with.
    """
    source = _shuffled(shards)[row] if config.sound == "shuffled" else row
    if config.sound == "shuffled" and source == row:
        split, role = (shards.columns[name][row] for name in ("split", "speaker"))
        raise MisfitError(
            f"data.sound: shuffled needs two clips of a role in a split, and the {split} split of {shards.folder} has "
            f"one of the {role}; use zeroed, or a larger corpus"
        )
    return source


@lru_cache(maxsize=2)
def _shuffled(shards: Shards) -> dict[int, int]:
    """By row with a clip: another one of the same role and split. The same pairs in every trial."""
    columns = shards.columns
    groups: dict[tuple[str, str], list[int]] = {}
    for row, samples in enumerate(columns["n_samples"]):
        if samples > 0:
            groups.setdefault((columns["split"][row], columns["speaker"][row]), []).append(row)
    rng = np.random.default_rng(zlib.crc32(shards.fingerprint.encode()))
    pairs: dict[int, int] = {}
    for _, rows in sorted(groups.items()):
        order = rng.permutation(rows).tolist()
        pairs |= dict(zip(order, order[1:] + order[:1], strict=True))  # a circle: nobody keeps his own
    return pairs


def read_clip(shards: Shards, item: Item, config: DataConfig, draw: Draw | None = None) -> np.ndarray | None:
    """What is heard for an item; None where nothing is. See `read_example`."""
    row = heard_source(shards, item, config)
    return None if row is None else clip_of(shards, row, config, draw)


def heard_source(shards: Shards, item: Item, config: DataConfig) -> int | None:
    """The row whose clip is heard for an item; None where nothing is."""
    row = heard_row(shards, TASKS[item[0]], item[1])
    return None if row is None else _source(shards, row, config)


def clip_of(shards: Shards, row: int, config: DataConfig, draw: Draw | None = None) -> np.ndarray:
    """A row's clip as it is heard: augmented, or under a control of the sound."""
    clip = shards.pcm(row)
    assert clip is not None  # `heard_row` chose a row with sound
    if draw is not None:
        clip = augmented(clip, config.augment, draw, shards.columns["id"][row])
    # A control comes last, so it is what it says: silence stays silence.
    if config.sound == "zeroed":
        return np.zeros_like(clip)
    if config.sound == "noisy":  # drawn from the utterance's id, so always the same
        return with_noise(clip, config.snr_db, np.random.default_rng(zlib.crc32(shards.columns["id"][row].encode())))
    return clip


def _taken(samples: int) -> np.ndarray:
    return np.empty(samples, "<i2")


def to_arrow(clips: Sequence[np.ndarray | None], take: Callable[[int], np.ndarray] = _taken) -> pa.Table:
    """Clips as a table with one row each, empty where there is none: the form in which they cross processes.

    Args:
        clips: int16 samples; copied once.
        take: gives memory for so many samples, in which the table will lie.
    """
    heard = [clip for clip in clips if clip is not None]
    pcm = take(sum(map(len, heard)))
    np.concatenate([pcm[:0], *heard], out=pcm)
    borders = np.cumsum([0, *(0 if clip is None else clip.nbytes for clip in clips)], dtype=np.int64)
    buffers = [None, pa.py_buffer(borders), pa.py_buffer(pcm)]
    return pa.table({"pcm": pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(clips), buffers)})


def from_arrow(table: pa.Table) -> Iterator[np.ndarray | None]:
    """The inverse of `to_arrow`; clips are not copied, so they hold the table's memory."""
    for chunk in table["pcm"].chunks:
        _, offsets, content = chunk.buffers()
        borders = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        pcm = np.frombuffer(content, "<i2") if borders[-1] > borders[0] else np.empty(0, "<i2")
        for start, end in pairwise(borders):
            yield pcm[start // 2 : end // 2] if end > start else None
