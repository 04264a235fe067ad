"""Find the speakers of transcripts that write them in front of what is said, and of those that do not name them."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError, listed
from data.importers.base.builder import UNKNOWN, TurnBuilder
from data.importers.base.cells import clean_name, speaker_key
from data.importers.base.tabular import read_text
from data.importers.base.timestamps import LONGEST

LONGEST_NAME = 5  # words
RTTM = ".rttm"
_MARK = r"\s*(?:[-\u2013\u2014\u2022]\s+|>{2,3}\s*)?"  # of a new speaker, before the name
_PREFIX = re.compile(
    rf"{_MARK}(?:\[([^\[\]:]{{1,40}})\]|([^\W\d_][^:\uff1a\t\[\]<>]{{0,39}}?))\s*(?::(?!//)|\uff1a|\t)\s*(.*)",
    re.DOTALL,
)
_TAG = re.compile(rf"{_MARK}[\[(]\s*(speaker[ _]?\w{{1,4}})\s*[\])]\s*(.*)", re.DOTALL | re.IGNORECASE)  # whisper.cpp
_RTTM = re.compile(r"SPEAKER\s+(.+)\s+\S+\s+([\d.eE+-]+)\s+([\d.eE+-]+)\s+\S+\s+\S+\s+(\S+|\S.*?\S)(?:\s+\S+){0,2}")


class Interval(NamedTuple):
    """When a speaker speaks, in seconds."""

    start: float
    end: float
    speaker: str


class Timeline:
    """Who speaks when."""

    def __init__(self, intervals: Iterable[Interval]) -> None:
        self._intervals = sorted(intervals)
        self._starts = [interval.start for interval in self._intervals]
        self._longest = max((interval.end - interval.start for interval in self._intervals), default=0.0)

    def speaker(self, start: float, end: float) -> str:
        """Return who speaks most of a time in seconds; "" if no speaker does."""
        first = bisect_left(self._starts, start - self._longest)
        seconds: dict[str, float] = {}
        for interval in self._intervals[first : bisect_left(self._starts, end)]:
            shared = min(end, interval.end) - max(start, interval.start)
            if shared > 0:
                seconds[interval.speaker] = seconds.get(interval.speaker, 0.0) + shared
        return max(seconds, key=seconds.__getitem__, default="")


def split_name(line: str) -> tuple[str, str] | None:
    """Return the name and the text of a line such as "Dr Lee: good morning"; None if it begins with no name.

    Whether it is a speaker's name can only be said from the whole transcript, see `names_of`.
    """
    match = _PREFIX.fullmatch(line)
    if match is None:
        tag = _TAG.fullmatch(line)
        return None if tag is None else (" ".join(tag[1].split()), tag[2])
    name = " ".join((match[1] or match[2]).split())
    return (name, match[3]) if 0 < len(name.split()) <= LONGEST_NAME else None


def names_of(
    lines: Sequence[str], builder: TurnBuilder, conversation: str, firsts: Sequence[str] | None = None
) -> set[str]:
    """Return the names of a transcript's speakers, as `speaker_key` writes them.

    A name before a colon is a speaker's if it has a role, if it occurs more than once, or if every line has one:
    "I told him: stop" occurs once.

    Args:
        lines: of the transcript.
        builder: knows the roles of the settings.
        conversation: id of the session.
        firsts: those lines that may begin with a name, if the others continue them; None: all.
    """
    names, begin = _names(lines), _names(lines if firsts is None else firsts)
    counts = Counter(name for name in names if name)
    everywhere = set(begin) if all(begin) else set[str]()
    return everywhere | {
        name for name, count in counts.items() if count > 1 or builder.role(name, conversation) != UNKNOWN
    }


def _names(lines: Iterable[str]) -> list[str]:
    return [speaker_key(found[0]) if found else "" for found in map(split_name, lines)]


def read_rttm(path: Path, encoding: str) -> dict[str, list[Interval]]:
    """Return who speaks when in each recording of a file of Rich Transcription Time Marked (NIST, RT-09).

    Raises:
        DataError: the file cannot be read.
    """
    recordings: dict[str, list[Interval]] = {}
    for number, line in enumerate(read_text(path, encoding).splitlines(), start=1):
        if line.split()[:1] != ["SPEAKER"]:
            continue
        match = _RTTM.fullmatch(line[:1000].strip())
        try:
            start, length = (float(match[2]), float(match[3])) if match is not None else (-1.0, -1.0)
        except ValueError:
            start = length = -1.0
        if match is None or not (0 <= start <= LONGEST and 0 <= length <= LONGEST):
            raise DataError(
                f"{path.name}:{number}: not a row of RTTM (SPEAKER file channel start length <NA> <NA> name); "
                "export it again"
            )
        recordings.setdefault(clean_name(match[1]), []).append(Interval(start, start + length, match[4]))
    return recordings


def timeline_of(path: Path, builder: TurnBuilder, session: str = "") -> Timeline | None:
    """Return who speaks when in a session, from the RTTM file with the name of its transcript; None if there is none.

    A file of another name counts if it is the only one in the folder and names the session.

    Args:
        path: of the transcript.
        builder: has the settings.
        session: id; "": the name of the transcript.

    Raises:
        DataError: the file cannot be read, or it has several recordings and not this one.
    """
    name = clean_name(session or path.stem)
    files = [other for other in sorted(path.parent.iterdir()) if other.suffix.lower() == RTTM]
    beside = next((other for other in files if clean_name(other.stem) in (name, clean_name(path.stem))), None)
    chosen = beside or (files[0] if len(files) == 1 else None)
    if chosen is None:
        return None
    recordings = read_rttm(chosen, builder.config.encoding)
    if name not in recordings and len(recordings) > 1 and beside is not None:
        raise DataError(f"{chosen.name}: no rows of {name}; it has {listed(recordings)}; name the files alike")
    only = next(iter(recordings.values()), None) if beside is not None else None
    intervals = recordings.get(name, only)
    return None if intervals is None else Timeline(intervals)


def no_speakers(path: Path, kind: str, session: str = "") -> DataError:
    """Return the error for a transcript without speakers; the session has its name unless it has one of its own."""
    return DataError(
        f"{path.name}: {kind} without speakers; put who speaks when beside it, as {session or path.stem}.rttm, or "
        "transcribe with speakers (diarisation), e.g. whisperx --diarize"
    )
