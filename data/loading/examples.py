"""Examples: the dialogue, the clip and the expected answer of an item, and clips as Arrow tables."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from data.config import DataConfig
from data.errors import MisfitError
from data.loading.augment import AugmentSeed, add_noise, augment_clip
from data.loading.tasks import TASKS, Item, answer, audio_row, last_row
from data.loading.teacher_files import TeacherLogits
from data.shards.dataset import Shards

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Example:
    """The input of the model for one item of a task, and the expected answer."""

    id: str  # of the turn, or of the session for a quality task
    task: str
    conversation: str
    speaker: str  # role of the turn
    answer: str
    subset: str | None
    turns: tuple[tuple[str, str], ...]  # (role, text), oldest first
    audio_turn: int | None  # index in `turns` of the turn with the clip
    pcm: np.ndarray | None  # the clip, int16 mono at 16 kHz; None: text only, or features
    features: "tuple[np.ndarray | Tensor, ...] | None" = None  # cached features, not the clip; float16 [T, D] each
    n_samples: int = 0  # of the clip, if `features` are given
    teacher_logits: TeacherLogits | None = None  # cached logits of the teacher


def read_example(
    shards: Shards,
    item: Item,
    config: DataConfig,
    with_audio: bool,
    seed: AugmentSeed | None = None,
    pcm: np.ndarray | None = None,
) -> Example:
    """Return the example of an item.

    Its dialogue has `config.history` turns before the last turn that the task may use, or more if the audio turn (the
    last one with a clip) is further back.

    Args:
        shards: the corpus.
        item: an item of a task.
        config: settings.
        with_audio: whether the clip is read.
        seed: augments the clip; None: it is not augmented.
        pcm: the clip if it was read already.
    """
    columns, (name, row) = shards.columns, item
    task = TASKS[name]
    last, audio = last_row(task, row), audio_row(shards, task, row)
    first = max(shards.sessions[row][0], last - config.history)
    first = first if audio is None else min(first, audio)
    texts = columns["text"][first : last + 1]
    if config.last_text == "omitted":
        texts[(last if audio is None else audio) - first] = ""
    session = task.answer == "quality"
    if with_audio and audio is not None:
        pcm = load_clip(shards, _clip_row(shards, audio, config), config, seed)
    return Example(
        id=columns["conversation" if session else "id"][row],
        task=name,
        conversation=columns["conversation"][row],
        speaker=columns["speaker"][row],
        answer=answer(shards, item),
        subset=columns["subset"][row] if task.answer == "label" and task.reads == "turn" else None,
        turns=tuple(zip(columns["speaker"][first : last + 1], texts, strict=True)),
        audio_turn=None if audio is None else audio - first,
        pcm=pcm,
    )


def clip_samples(shards: Shards, item: Item, config: DataConfig) -> int:
    """Return the number of samples of the clip of an item before augmentation, 0 without a clip. Reads no audio."""
    row = audio_source_row(shards, item, config)
    samples: int = 0 if row is None else shards.columns["n_samples"][row]
    return samples


def audio_source_row(shards: Shards, item: Item, config: DataConfig) -> int | None:
    """Return the row whose clip is used for an item; None if the item has no clip.

    Raises:
        MisfitError: data.sound is shuffled, and there is no other clip.
    """
    row = audio_row(shards, TASKS[item[0]], item[1])
    return None if row is None else _clip_row(shards, row, config)


def _clip_row(shards: Shards, row: int, config: DataConfig) -> int:
    """Return the row whose clip is used for a row: the row itself unless data.sound is shuffled."""
    if config.sound != "shuffled":
        return row
    other = _shuffled_rows(shards)[row]
    if other == row:
        split, role = (shards.columns[name][row] for name in ("split", "speaker"))
        raise MisfitError(
            f"data.sound: shuffled needs two clips of a role in a split, but the {split} split of {shards.folder} has "
            f"only one of the {role}; use zeroed, or a larger corpus"
        )
    return other


@lru_cache(maxsize=2)
def _shuffled_rows(shards: Shards) -> dict[int, int]:
    """Map each row with a clip to another one of the same role and split, equally in every trial."""
    columns = shards.columns
    groups: dict[tuple[str, str], list[int]] = {}
    for row, samples in enumerate(columns["n_samples"]):
        if samples > 0:
            groups.setdefault((columns["split"][row], columns["speaker"][row]), []).append(row)
    rng = np.random.default_rng(zlib.crc32(shards.stored_fingerprint.encode()))
    pairs: dict[int, int] = {}
    for _, rows in sorted(groups.items()):
        order = rng.permutation(rows).tolist()
        pairs |= dict(zip(order, order[1:] + order[:1], strict=True))  # a cycle: no row is mapped to itself
    return pairs


def read_item_clip(
    shards: Shards, item: Item, config: DataConfig, seed: AugmentSeed | None = None
) -> np.ndarray | None:
    """Return the clip of an item, as `read_example` does; None if it has none."""
    row = audio_source_row(shards, item, config)
    return None if row is None else load_clip(shards, row, config, seed)


def load_clip(shards: Shards, row: int, config: DataConfig, seed: AugmentSeed | None = None) -> np.ndarray:
    """Return the clip of a row, augmented and changed according to `config.sound`."""
    clip = shards.pcm(row)
    assert clip is not None  # `audio_row` selects rows with a clip
    if seed is not None:
        clip = augment_clip(clip, config.augment, seed, shards.columns["id"][row])
    # The control comes last, so that silence is not augmented with noise.
    if config.sound == "zeroed":
        return np.zeros_like(clip)
    if config.sound == "noisy":  # the seed is the id of the utterance, so the noise is always the same
        return add_noise(clip, config.snr_db, np.random.default_rng(zlib.crc32(shards.columns["id"][row].encode())))
    return clip


def clips_to_arrow(
    clips: Sequence[np.ndarray | None], allocate: Callable[[int], np.ndarray] = lambda samples: np.empty(samples, "<i2")
) -> pa.Table:
    """Return clips as a table with one row each, which is empty for None, to send them to another process.

    Args:
        clips: int16 samples; they are copied once.
        allocate: returns memory for a number of samples; the table will use it.
    """
    present = [clip for clip in clips if clip is not None]
    pcm = allocate(sum(map(len, present)))
    np.concatenate([pcm[:0], *present], out=pcm)
    borders = np.cumsum([0, *(0 if clip is None else clip.nbytes for clip in clips)], dtype=np.int64)
    buffers = [None, pa.py_buffer(borders), pa.py_buffer(pcm)]
    return pa.table({"pcm": pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(clips), buffers)})


def clips_from_arrow(table: pa.Table) -> Iterator[np.ndarray | None]:
    """Yield the clips of a table of `clips_to_arrow`; they are not copied, so they keep the table in memory."""
    for chunk in table["pcm"].chunks:
        _, offsets, content = chunk.buffers()
        borders = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        pcm = np.frombuffer(content, "<i2") if borders[-1] > borders[0] else np.empty(0, "<i2")
        for start, end in pairwise(borders):
            yield pcm[start // 2 : end // 2] if end > start else None
