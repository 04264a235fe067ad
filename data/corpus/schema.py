"""The vocabulary of a corpus: turns, conversations, findings, and the Arrow schema (version 3) of turns in shards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.corpus.issues import Finding, Span

SCHEMA_VERSION = "3"
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
    flags: tuple[str, ...] = ()  # codes of the findings about this turn
    votes: dict[str, int] = field(default_factory=dict)  # label → annotators who gave it, where there are several
    clip: Path | None = None  # an audio file of this turn alone
    given: tuple[float | None, float | None] | None = None  # the source's times, where they were aligned
    confidence: float | None = None  # of the alignment, 0 to 1

    @property
    def span(self) -> Span | None:
        """Start and end, where both are known."""
        return None if self.start is None or self.end is None else (self.start, self.end)


@dataclass(slots=True)
class Conversation:
    """The turns of one session, in order, with its recording when the audio is still in a file."""

    id: str
    group: str  # what a split must never cut: the video, else the conversation itself
    turns: list[Turn]
    recording: Path | None = None  # may be missing: that is a finding of the preparation, not of the importer
    quality: str | None = None  # label of the whole session
    people: tuple[str, ...] = ()  # who speaks, where it is known: what a split by speaker must not cut
    split: str | None = None  # train, val or test, where the corpus comes with a split


def flag(turn: Turn, findings: list[Finding], code: str, message: str, other: Span | None = None) -> None:
    """Note a finding about a turn that is kept, or a turn's time that is not to be used."""
    turn.flags += (code,)
    findings.append(Finding(code, turn.where, turn.id, message, turn.span, other))


def reject(turn: Turn, findings: list[Finding], code: str, message: str, other: Span | None = None) -> None:
    """Note a finding that makes a turn unusable as an example: its words stay as context, without label and sound."""
    flag(turn, findings, code, message, other)
    turn.label = turn.audio = turn.clip = None


def is_rejected(flags: Sequence[str]) -> bool:
    """Whether the findings of a turn reject it."""
    return any(code.startswith("E_") for code in flags)


@dataclass(slots=True)
class Corpus:
    """What an importer returns. `labels` and `qualities` are ordered (the index is the class).

    `roles` says who may carry which label; the tasks know the roles "client" and "therapist".
    """

    name: str
    labels: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]
    conversations: list[Conversation]
    findings: list[Finding] = field(default_factory=list)
    qualities: tuple[str, ...] = ()
    declared: bool = True  # False: the labels are those that occur, so a typing error looks like a class


def split_label(label: str) -> tuple[str, ...]:
    """The labels that a turn carries."""
    return tuple(label.split(JOIN))


def _word() -> pa.DataType:
    return pa.dictionary(pa.int16(), pa.string())


TURN_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("conversation", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("speaker", _word(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("label", _word()),
        pa.field("votes", pa.map_(pa.string(), pa.int32())),
        pa.field("subset", _word()),
        pa.field("quality", _word()),  # of the session
        pa.field("t_start", pa.float64()),
        pa.field("t_end", pa.float64()),
        pa.field("given_start", pa.float64()),  # before the alignment
        pa.field("given_end", pa.float64()),
        pa.field("confidence", pa.float32()),  # of the alignment
        pa.field("n_samples", pa.int32(), nullable=False),  # 0: no sound
        pa.field("audio", pa.large_binary()),  # in the manifest's codec: pcm16 (little endian) or flac
        pa.field("audio_hash", pa.string(), nullable=False),  # of the samples, whatever the codec; "" without sound
        pa.field("crc32", pa.uint32(), nullable=False),  # of the stored bytes
        pa.field("peak", pa.float32()),
        pa.field("rms_db", pa.float32()),
        pa.field("flags", pa.string(), nullable=False),  # finding codes, separated by spaces
        pa.field("source_rate", pa.int32()),  # Hz
        pa.field("source_channels", pa.int32()),
        pa.field("recording_hash", pa.string(), nullable=False),  # of the session's whole sound; "" without
    ]
)
