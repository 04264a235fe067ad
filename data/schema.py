"""The vocabulary of a corpus: turns, conversations, findings, and the Arrow schema (version 2) of turns in shards."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = "2"
SAMPLE_RATE = 16_000  # Hz, of all audio in shards
SPLITS = ("train", "val", "test")
JOIN = "|"  # between the labels of a turn that has several


@dataclass(slots=True)
class Turn:
    """One utterance of a conversation, as an importer yields it."""

    id: str  # unique in the corpus, e.g. "12/34"
    index: int  # position in its conversation, from 0
    speaker: str  # role, e.g. "client"
    text: str
    label: str | None = None  # None: context only; several are joined with JOIN
    start: float | None = None  # s in the recording
    end: float | None = None  # s in the recording
    subset: str | None = None  # a named part of the corpus with its own accuracy, e.g. "ambiguous"
    audio: np.ndarray | None = None  # int16 mono at SAMPLE_RATE; None: text only
    where: str = ""  # "file:line" of the source, for messages
    flags: tuple[str, ...] = ()  # codes of the findings that kept but marked this turn


@dataclass(slots=True)
class Conversation:
    """The turns of one session, in order, with its recording when the audio is still in a file."""

    id: str
    group: str  # what a split must never cut: the video, or the person
    turns: list[Turn]
    recording: Path | None = None
    quality: str | None = None  # label of the whole session


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a person should know about the corpus: `code`, where it is, which utterance, what was done."""

    code: str
    where: str
    utterance: str
    message: str


def flag(turn: Turn, findings: list[Finding], code: str, message: str) -> None:
    """Note a finding about a turn that is kept."""
    turn.flags += (code,)
    findings.append(Finding(code, turn.where, turn.id, message))


@dataclass(slots=True)
class Corpus:
    """What an importer returns. `labels` and `qualities` are ordered (the index is the class).

    `roles` says who may carry which label; the tasks know the roles "client" and "therapist".
    """

    name: str
    labels: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]
    conversations: Iterable[Conversation]
    findings: list[Finding] = field(default_factory=list)
    qualities: tuple[str, ...] = ()


def split_label(label: str) -> tuple[str, ...]:
    """The labels that a turn carries."""
    return tuple(label.split(JOIN))


def _word() -> pa.DataType:
    return pa.dictionary(pa.int16(), pa.string())


TURN_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("conversation", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("split", _word(), nullable=False),
        pa.field("speaker", _word(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("label", _word()),
        pa.field("subset", _word()),
        pa.field("quality", _word()),  # of the session
        pa.field("t_start", pa.float64()),
        pa.field("t_end", pa.float64()),
        pa.field("n_samples", pa.int32(), nullable=False),  # 0: no sound
        pa.field("audio", pa.large_binary()),  # pcm16, little endian
        pa.field("crc32", pa.uint32(), nullable=False),
        pa.field("peak", pa.float32()),
        pa.field("rms_db", pa.float32()),
        pa.field("flags", pa.string(), nullable=False),  # finding codes, separated by spaces
    ]
)
