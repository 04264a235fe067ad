"""What a preparation tells about a corpus: every code, what was done about it, and the finding that carries it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from data.errors import DataError

Span = tuple[float, float]  # start and end, s

REJECTED = "rejected: its words stay as context, without label and sound"
SILENCED = "kept as text, without sound"
KEPT = "kept and flagged"
DROPPED = "dropped: the first one stays"
FAILED = "the build fails"

CODES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # code: (what it means, what is done)
        "E_AUDIO_MISSING": ("the recording is not there", REJECTED),
        "E_AUDIO_UNREADABLE": ("the recording cannot be decoded", REJECTED),
        "E_AUDIO_EMPTY": ("the recording holds no samples", REJECTED),
        "E_AUDIO_NAN": ("the clip holds NaN or infinite samples", REJECTED),
        "E_TOO_SHORT": ("the clip is shorter than 0.1 s", REJECTED),
        "E_TS_FORMAT": ("the time cannot be read", REJECTED),
        "E_TS_RANGE": ("the time lies outside the recording by more than 50 ms", REJECTED),
        "E_TS_END": ("the end lies before the start", REJECTED),
        "E_LABEL": ("the label is unknown", REJECTED),
        "E_LABEL_ROLE": ("the label belongs to another role", REJECTED),
        "E_SPEAKER": ("nobody knows who speaks", REJECTED),
        "W_TS_ZERO": ("the utterance has no length", SILENCED),
        "W_TS_OPEN": ("the utterance has no start or no end", SILENCED),
        "W_TS_FORMAT": ("the time is written oddly, and was read", KEPT),
        "W_TS_CLAMPED": ("the end lies less than 50 ms after the recording's", "cut at the recording's end"),
        "W_TS_OVERLAP": ("the utterance overlaps another one by more than 50 ms", KEPT),
        "W_TS_ORDER": ("the utterance starts before the one above it", KEPT),
        "W_CLIPPED": ("more than 0.1 % of the samples are at full scale", KEPT),
        "W_SILENT": ("the clip is silent", KEPT),
        "W_DC": ("the samples have an offset of more than 0.02", KEPT),
        "W_STEREO": ("the recording has several channels", "mixed down to one"),
        "W_TRUNCATED": ("the recording breaks off before the length that it announces", KEPT),
        "W_RESAMPLED": ("the recording has another rate", "resampled to 16 kHz"),
        "W_TOO_LONG": ("the clip is longer than 30 s", KEPT),
        "W_DUPLICATE": ("the same utterance stands twice, equal in everything", DROPPED),
        "W_LABEL_TIE": ("annotators disagree without a majority", "the first of the tied labels was taken"),
        "W_LABEL_RARE": ("the label is rare and resembles a frequent one", KEPT),
        "W_AUDIO_SHARED": ("sessions share a recording or a clip", "kept in one split"),
        "W_ALIGN_LOW": ("the alignment is not sure", "the given times stay"),
        "F_DUPLICATE": ("an id names two different utterances", FAILED),
        "F_LEAK_CONVERSATION": ("a conversation stands in two splits", FAILED),
        "F_LEAK_GROUP": ("a video or person stands in two splits", FAILED),
        "F_LEAK_AUDIO": ("the same sound stands in two splits", FAILED),
        "F_ENCODING": ("the text is not in the encoding", FAILED),
        "F_REJECTED": ("too many rows are rejected", FAILED),
    }
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a person should know about the corpus."""

    code: str  # of CODES; E_: rejected, W_: kept, F_: the build fails
    where: str  # "file:line"
    utterance: str  # id of the turn, or of the conversation when it concerns the recording
    message: str  # what is wrong, in one line
    span: Span | None = None  # of the utterance
    other: Span | None = None  # of what it was held against: the recording, or another utterance

    @property
    def done(self) -> str:
        """What was done about it."""
        return CODES[self.code][1]

    def as_dict(self) -> dict[str, Any]:
        """For findings.jsonl; read back by `from_dict`."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {**plain, "done": self.done}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Finding":
        """The inverse of `as_dict`."""
        spans = {name: tuple(content[name]) if content[name] else None for name in ("span", "other")}
        return cls(content["code"], content["where"], content["utterance"], content["message"], **spans)


class BuildError(DataError):
    """A corpus that must not become shards, with the findings that forbid it."""

    def __init__(self, message: str, findings: list[Finding]) -> None:
        super().__init__(message)
        self.findings = findings

    def __reduce__(self) -> tuple[type["BuildError"], tuple[str, list[Finding]]]:
        return BuildError, (str(self), self.findings)


def failure(findings: Sequence[Finding], advice: str, code: str = "") -> BuildError:
    """One error for findings that fail the build: the first ones in full."""
    shown = "".join(f"\n  {line(finding)}" for finding in findings[:5])
    more = f"\n  and {len(findings) - 5} more" if len(findings) > 5 else ""
    return BuildError(f"{code or findings[0].code}: {advice}{shown}{more}", list(findings))


def line(finding: Finding) -> str:
    """A finding for a message."""
    return f"{finding.code} {finding.where}, {finding.utterance}: {finding.message}"
