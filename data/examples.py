"""From turns to examples: which turns are classified, and what dialogue each one is read with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data.errors import DataError
from data.shards import Shards


@dataclass(frozen=True, slots=True)
class Example:
    """One utterance to classify, with the dialogue before it."""

    id: str
    conversation: str
    speaker: str
    label: str
    subset: str | None
    text: str
    history: tuple[tuple[str, str], ...]  # (speaker, text), oldest first
    pcm: np.ndarray | None  # int16 mono at 16 kHz; None: read as text only


EXAMPLE_TYPE = pa.struct(
    [
        ("id", pa.string()),
        ("conversation", pa.string()),
        ("speaker", pa.string()),
        ("label", pa.string()),
        ("subset", pa.string()),
        ("text", pa.string()),
        ("history", pa.list_(pa.list_(pa.string()))),
        ("pcm", pa.large_binary()),
    ]
)


def targets(shards: Shards, split: str) -> list[int]:
    """Rows of a split that are classified: labelled turns, and where the corpus has sound, those with a clip.

    The same rows for every modality, so that text and speech are measured on the same items.

    Raises:
        DataError: the split holds none.
    """
    columns = shards.columns
    audible = has_sound(shards)
    rows = [
        row
        for row in range(len(columns["id"]))
        if columns["split"][row] == split
        and columns["label"][row] is not None
        and (columns["n_samples"][row] > 0 or not audible)
    ]
    if not rows:
        raise DataError(f"{shards.folder}: the {split} split has no labelled utterance; choose another split or corpus")
    return rows


def has_sound(shards: Shards) -> bool:
    """Whether any turn of the corpus has a clip."""
    return any(hours > 0 for hours in shards.manifest.hours.values())


def read_example(shards: Shards, row: int, history: int, sound: bool) -> Example:
    """The example of a row, with at most `history` turns before it and, if `sound`, its clip."""
    columns = shards.columns
    conversation = columns["conversation"][row]
    first = max(0, row - history)
    before = tuple(
        (columns["speaker"][other], columns["text"][other])
        for other in range(first, row)
        if columns["conversation"][other] == conversation
    )
    clip = shards.pcm(row) if sound else None
    return Example(
        id=columns["id"][row],
        conversation=conversation,
        speaker=columns["speaker"][row],
        label=columns["label"][row],
        subset=columns["subset"][row],
        text=columns["text"][row],
        history=before,
        pcm=None if clip is None else np.frombuffer(clip, "<i2"),
    )


def to_arrow(batches: Sequence[Sequence[Example]]) -> pa.Table:
    """Batches as a table with one row a batch, the form in which they cross processes."""
    rows = [
        [
            {name: getattr(example, name) for name in Example.__slots__}
            | {"pcm": None if example.pcm is None else example.pcm.tobytes()}
            for example in batch
        ]
        for batch in batches
    ]
    return pa.table({"examples": pa.array(rows, pa.large_list(EXAMPLE_TYPE))})


def from_arrow(table: pa.Table) -> list[list[Example]]:
    """The inverse of `to_arrow`."""
    return [[_example(row) for row in batch] for batch in table["examples"].to_pylist()]


def _example(row: dict[str, Any]) -> Example:
    row["history"] = tuple(map(tuple, row["history"]))
    row["pcm"] = None if row["pcm"] is None else np.frombuffer(row["pcm"], "<i2")
    return Example(**row)
