"""Turns, conversations and corpora, and the Arrow schema of turns in shards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.corpus.decoding import StoredClip
from data.corpus.issues import Finding, Span

SCHEMA_VERSION = "3"
SAMPLE_RATE = 16_000  # Hz, of all audio in shards
SPLITS = ("train", "val", "test")
JOIN = "|"  # separates the labels of a turn that has several


@dataclass(slots=True)
class Turn:
    """One utterance of a conversation, as an importer returns it."""

    id: str  # unique in the corpus, e.g. "12/34"
    index: int  # position in its conversation, from 0
    speaker: str  # role, e.g. "client"
    text: str
    label: str | None = None  # None: context only; several labels are joined with JOIN
    start: float | None = None  # s in the recording
    end: float | None = None  # s in the recording
    subset: str | None = None  # part of the corpus with a separate accuracy, e.g. "ambiguous"
    audio: np.ndarray | None = None  # int16 mono at SAMPLE_RATE; None: text only
    where: str = ""  # "file:line" of the source, for messages
    flags: tuple[str, ...] = ()  # codes of the findings about this turn, see CODES
    votes: dict[str, int] = field(
        default_factory=dict
    )  # what annotators gave, joined as in `label` → how many of them, if there are several
    clip: Path | StoredClip | None = None  # audio file with only this turn, or one in a row of a table
    recording: Path | None = None  # of this speaker, if each has a recording; None: that of the conversation
    given: tuple[float | None, float | None] | None = None  # times of the source, if they were aligned
    confidence: float | None = None  # of the alignment, 0 to 1

    @property
    def span(self) -> Span | None:
        """Return start and end (s), or None if one of them is unknown."""
        return None if self.start is None or self.end is None else (self.start, self.end)


@dataclass(slots=True)
class Conversation:
    """The turns of one session in order, and the recording if the audio is still in a file."""

    id: str
    group: str  # what stays in one split: the video, or the conversation itself
    turns: list[Turn]
    recording: Path | None = None  # the preparation, not the importer, checks whether it exists
    quality: str | None = None  # quality label of the whole session
    people: tuple[str, ...] = ()  # identities of the speakers if known; a split by speaker keeps them together
    split: str | None = None  # train, val or test, if the corpus has a predefined split


def flag(turn: Turn, findings: list[Finding], code: str, message: str, other: Span | None = None) -> None:
    """Add a finding about a turn that is kept, or about a time that is not used."""
    turn.flags += (code,)
    findings.append(Finding(code, turn.where, turn.id, message, turn.span, other))


def reject(turn: Turn, findings: list[Finding], code: str, message: str, other: Span | None = None) -> None:
    """Add a finding that rejects a turn as an example. Its text stays as context, without label and audio."""
    flag(turn, findings, code, message, other)
    turn.label = turn.audio = turn.clip = turn.recording = None


def is_rejected(flags: Sequence[str]) -> bool:
    """Return whether one of these finding codes rejects the turn."""
    return any(code.startswith("E_") for code in flags)


@dataclass(slots=True)
class Corpus:
    """The result of an importer.

    `labels` and `qualities` are ordered: the index is the class. `roles` maps a role to the labels that it may have;
    the tasks know the roles "client" and "therapist".
    """

    name: str
    labels: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]
    conversations: list[Conversation]
    findings: list[Finding] = field(default_factory=list)
    qualities: tuple[str, ...] = ()
    declared: bool = True  # False: the labels are those that occur, so a typing error looks like a label


def split_label(label: str) -> tuple[str, ...]:
    """Return the labels of a turn."""
    return tuple(label.split(JOIN))


TurnRow = dict[str, object]  # column of TURN_SCHEMA → value
_WORD = pa.dictionary(pa.int16(), pa.string())
TURN_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("conversation", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("speaker", _WORD, nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("label", _WORD),
        pa.field("votes", pa.map_(pa.string(), pa.int32())),
        pa.field("subset", _WORD),
        pa.field("quality", _WORD),  # of the session
        pa.field("t_start", pa.float64()),
        pa.field("t_end", pa.float64()),
        pa.field("given_start", pa.float64()),  # before the alignment
        pa.field("given_end", pa.float64()),
        pa.field("confidence", pa.float32()),  # of the alignment
        pa.field("n_samples", pa.int32(), nullable=False),  # 0: no audio
        pa.field("audio", pa.large_binary()),  # in the manifest's codec: pcm16 (little endian) or flac
        pa.field(
            "audio_hash", pa.string(), nullable=False
        ),  # of the samples, independent of the codec; "" without audio
        pa.field("crc32", pa.uint32(), nullable=False),  # of the stored bytes
        pa.field("peak", pa.float32()),
        pa.field("rms_db", pa.float32()),
        pa.field("flags", pa.string(), nullable=False),  # finding codes, separated by spaces
        pa.field("source_rate", pa.int32()),  # Hz
        pa.field("source_channels", pa.int32()),
        pa.field("recording_hash", pa.string(), nullable=False),  # of the whole recording; "" without one
    ]
)
