"""Findings of a preparation: the codes, their meaning and consequence, and the errors that they raise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypedDict

from data.errors import DataError

Span = tuple[float, float]  # start and end, s

REJECTED = "rejected: its text stays as context, without label and audio"
SILENCED = "kept as text, without audio"
UNLABELLED = "kept as context, without label"
KEPT = "kept and flagged"
DROPPED = "dropped: the first row is kept"
FAILED = "the preparation fails"

CODES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # code: (meaning, consequence)
        "E_AUDIO_MISSING": ("the recording does not exist", REJECTED),
        "E_AUDIO_UNREADABLE": ("the recording cannot be decoded", REJECTED),
        "E_AUDIO_EMPTY": ("the recording contains no samples", REJECTED),
        "E_AUDIO_NAN": ("the clip contains NaN or infinite samples", REJECTED),
        "E_TOO_SHORT": ("the clip is shorter than 0.1 s", REJECTED),
        "E_TS_FORMAT": ("the time cannot be parsed", REJECTED),
        "E_TS_RANGE": ("the turn starts before the recording, or ends more than 0.5 s after it", REJECTED),
        "E_TS_END": ("the end is before the start", REJECTED),
        "E_LABEL": ("the label is unknown", REJECTED),
        "E_LABEL_ROLE": ("the label belongs to another role", REJECTED),
        "E_LABEL_CELL": ("the cell is no code that can be read with certainty", REJECTED),
        "E_SPEAKER": ("the speaker has no role", REJECTED),
        "W_TS_ZERO": ("the utterance has zero length", SILENCED),
        "W_TS_OPEN": ("the utterance has no start or no end", SILENCED),
        "W_TS_FORMAT": ("the time has an unusual format, but was parsed", KEPT),
        "W_TS_CLAMPED": (
            "the end is less than 0.5 s after the end of the recording",
            "cut at the end of the recording",
        ),
        "W_TS_OVERLAP": ("the utterance overlaps another one by more than 50 ms", KEPT),
        "W_TS_ORDER": ("the utterance starts before the previous one", KEPT),
        "W_TS_SORTED": (
            "the rows of the session are not in the order of its turns",
            "sorted by turn number, or by start",
        ),
        "W_SPEAKERS_SPLIT": ("the words of a segment have several speakers", "split where the speaker changes"),
        "W_NO_WORDS": ("the turn contains only annotations, such as <sync>", SILENCED),
        "W_CLIPPED": ("more than 0.1 % of the samples are at full scale", KEPT),
        "W_SILENT": ("the clip is silent", KEPT),
        "W_DC": ("the samples have an offset of more than 0.02", KEPT),
        "W_STEREO": ("the recording has several channels", "mixed down to one"),
        "W_AUDIO_SPEAKERS": ("each speaker of the session has a recording", "turns are cut from that of their speaker"),
        "W_TRUNCATED": ("the recording is shorter than its header announces", KEPT),
        "W_LENGTH": ("the recording is longer than its header announces", "read to its end"),
        "W_SCALED": ("the samples of the recording exceed full scale", "the whole recording is scaled down"),
        "W_AUDIO_GAP": ("the recording has gaps in its times", "filled with silence"),
        "W_RESAMPLED": ("the recording has another sample rate", "resampled to 16 kHz"),
        "W_TOO_LONG": ("the clip is longer than 30 s", KEPT),
        "W_DUPLICATE": ("the same utterance occurs twice with equal content", DROPPED),
        "W_LABEL_TIE": ("the annotators disagree without a majority", "the first of the tied labels is used"),
        "W_LABEL_VOTE": (
            "an annotator gave a label that the role does not have",
            "the vote does not count where models train on votes",
        ),
        "W_LABEL_RARE": ("the label is rare and resembles a frequent one", KEPT),
        "W_LABEL_SINGLE": ("the corpus or a split has only one label", "kept; metrics of labels tell little"),
        "W_LABEL_UNSEEN": ("the train split lacks a label of the val or test split", "kept; it counts as wrong"),
        "W_LABEL_MISSING": ("the code is a word for a missing value", UNLABELLED),
        "W_LABEL_UNICODE": (
            "the code has invisible, full-width or other compatibility characters",
            "normalised (NFKC)",
        ),
        "W_LABEL_SEVERAL": ("the cell joins codes that also occur alone", "read as several codes"),
        "W_LABEL_MODIFIER": (
            "the code has a mark that is no part of it in the codebook",
            "read as the code without the mark",
        ),
        "W_LABEL_ABSENT": ("the codebook has classes or codes that never occur", "kept; they count in the metrics"),
        "W_LABEL_NUMBER": ("the codes are numbers without names", KEPT),
        "W_TEXT_MISSING": ("the text is a word for a missing value", "read as a turn without text"),
        "W_TEXT_EMPTY": ("the turn has neither text nor audio", UNLABELLED),
        "W_FILE_OTHER": ("the file is not of this format", "left out"),
        "W_TIER_OTHER": ("the tier has neither text nor codes", "left out"),
        "W_CODE_ALONE": ("the code lies in no turn", "left out"),
        "W_SESSION_EMPTY": ("the session has no turns", "left out"),
        "W_AUDIO_SHARED": ("sessions share a recording or a clip", "kept in one split"),
        "W_ALIGN_LOW": ("the confidence of the alignment is low", "the given times are kept"),
        "F_DUPLICATE": ("one id is used for two different utterances", FAILED),
        "F_LEAK_CONVERSATION": ("a conversation is in two splits", FAILED),
        "F_LEAK_GROUP": ("a video or person is in two splits", FAILED),
        "F_LEAK_AUDIO": ("the same audio is in two splits", FAILED),
        "F_ENCODING": ("the text does not have the configured encoding", FAILED),
        "F_REJECTED": ("too many rows are rejected", FAILED),
    }
)


class FindingJson(TypedDict):
    """A finding as a line of findings.jsonl."""

    code: str
    where: str
    utterance: str
    message: str
    span: Span | None
    other: Span | None
    done: str  # the consequence


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of the corpus that a person should know about."""

    code: str  # key of CODES; E_: the turn is rejected, W_: it is kept, F_: the preparation fails
    where: str  # "file:line"
    utterance: str  # id of the turn, or of the conversation if it concerns the recording
    message: str  # the problem, in one line
    span: Span | None = None  # of the utterance
    other: Span | None = None  # of the recording or utterance that it was compared with

    @property
    def consequence(self) -> str:
        """Return what the preparation did about the problem."""
        return CODES[self.code][1]

    def as_dict(self) -> FindingJson:
        """Return the finding as plain values for findings.jsonl."""
        return {
            "code": self.code,
            "where": self.where,
            "utterance": self.utterance,
            "message": self.message,
            "span": self.span,
            "other": self.other,
            "done": self.consequence,
        }

    @classmethod
    def from_dict(cls, content: FindingJson) -> "Finding":
        """Return the finding of which `as_dict` returned `content`."""
        span, other = ((pair[0], pair[1]) if pair else None for pair in (content["span"], content["other"]))
        return cls(content["code"], content["where"], content["utterance"], content["message"], span, other)


class BuildError(DataError):
    """A corpus must not become shards; the findings say why."""

    def __init__(self, message: str, findings: list[Finding]) -> None:
        super().__init__(message)
        self.findings = findings

    def __reduce__(self) -> tuple[type["BuildError"], tuple[str, list[Finding]]]:
        return BuildError, (str(self), self.findings)


def build_error(findings: Sequence[Finding], advice: str, code: str = "") -> BuildError:
    """Return one error for all findings that fail the preparation; the message lists the first five kinds."""
    alike: dict[tuple[str, str], list[Finding]] = {}  # code and message → findings
    for finding in findings:
        alike.setdefault((finding.code, finding.message), []).append(finding)
    groups = list(alike.values())
    lines = "".join(f"\n  {format_finding(group[0])}{_others(group)}" for group in groups[:5])
    left = sum(map(len, groups[5:]))
    more = f"\n  and {left} more" if left else ""
    return BuildError(f"{code or findings[0].code}: {advice}{lines}{more}", list(findings))


def _others(group: Sequence[Finding]) -> str:
    """Return how often a finding occurs, and the next places."""
    if len(group) == 1:
        return ""
    places = ", ".join(finding.where for finding in group[1:3])
    return f" ({len(group)} x, also at {places}{' …' if len(group) > 3 else ''})"


def format_finding(finding: Finding) -> str:
    """Return a finding in one line."""
    return f"{finding.code} {finding.where}, {finding.utterance}: {finding.message}"
