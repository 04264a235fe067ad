"""Find the speakers of transcripts that write them in front of what is said, and of those that do not name them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.importers.base.builder import UNKNOWN, TurnBuilder
from data.importers.base.cells import speaker_key
from data.importers.base.tabular import read_text

LONGEST_NAME = 5  # words
_PREFIX = re.compile(
    r"\s*(?:[-\u2013\u2014\u2022]\s+)?(?:\[([^\[\]:]{1,40})\]|([^\W\d_][^:\t\[\]<>]{0,39}?))\s*(?::(?!//)|\t)\s*(.*)",
    re.DOTALL,
)


class Interval(NamedTuple):
    """When somebody speaks, in seconds."""

    start: float
    end: float
    speaker: str


def split_name(line: str) -> tuple[str, str] | None:
    """Return the name and the text of a line such as "Dr Lee: good morning"; None if it begins with no name.

    Whether it is a speaker's name can only be said from the whole transcript, see `names_of`.
    """
    match = _PREFIX.fullmatch(line)
    if match is None:
        return None
    name = " ".join((match[1] or match[2]).split())
    return (name, match[3]) if 0 < len(name.split()) <= LONGEST_NAME else None


def names_of(lines: Sequence[str], builder: TurnBuilder, conversation: str) -> set[str]:
    """Return the names of a transcript's speakers, as `speaker_key` writes them.

    A name before a colon is a speaker's if it has a role, if it occurs more than once, or if every line has one:
    "I told him: stop" occurs once.
    """
    names = [found and speaker_key(found[0]) for found in map(split_name, lines)]
    counts = Counter(name for name in names if name)
    if all(names):
        return set(counts)
    return {name for name, count in counts.items() if count > 1 or builder.role(name, conversation) != UNKNOWN}


def read_rttm(path: Path, encoding: str) -> list[Interval]:
    """Read who speaks when from a file of Rich Transcription Time Marked (NIST, RT-09).

    Raises:
        DataError: the file cannot be read.
    """
    intervals = []
    for number, line in enumerate(read_text(path, encoding).splitlines(), start=1):
        cells = line.split()
        if not cells or cells[0] != "SPEAKER":
            continue
        try:
            start, length, speaker = float(cells[3]), float(cells[4]), cells[7]
        except (IndexError, ValueError):
            raise DataError(
                f"{path.name}:{number}: not a row of RTTM (SPEAKER file channel start length <NA> <NA> name); "
                "export it again"
            ) from None
        intervals.append(Interval(start, start + length, speaker))
    return intervals


def rttm_beside(path: Path, builder: TurnBuilder) -> list[Interval]:
    """Return who speaks when, from the RTTM file with the name of a transcript; [] if there is none."""
    beside = path.with_suffix(".rttm")
    return read_rttm(beside, builder.config.encoding) if beside.exists() else []


def speaker_of(start: float, end: float, intervals: Iterable[Interval]) -> str:
    """Return who speaks most of a time; "" if nobody does."""
    seconds: Counter[str] = Counter()
    for interval in intervals:
        seconds[interval.speaker] += max(0.0, min(end, interval.end) - max(start, interval.start))  # type: ignore[assignment]
    return max((speaker for speaker in seconds if seconds[speaker] > 0), key=seconds.__getitem__, default="")


def no_speakers(path: Path, kind: str) -> DataError:
    """Return the error for a transcript without speakers."""
    return DataError(
        f"{path.name}: {kind} without speakers; put who speaks when beside it, as {path.stem}.rttm, or transcribe with "
        "speakers (diarisation), e.g. whisperx --diarize"
    )
