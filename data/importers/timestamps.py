"""Times as written, and ends that follow from the next start."""

import re
from collections.abc import Sequence
from itertools import zip_longest

from data.corpus.issues import Finding
from data.corpus.schema import Turn, flag, is_rejected, reject

LONGEST = 1e6  # s: more is no time of a session
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
USUAL = re.compile(rf"{NUMBER}|(?:\d{{1,2}}:)?\d{{1,2}}:\d\d(?:\.\d+)?")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+)(?:[.,](\d+))?")


def read_time(
    stamp: str, turn: Turn, findings: list[Finding], unit: str = "s", usual: re.Pattern[str] = USUAL
) -> float | None:
    """Seconds of a time written as a plain number or [HH:]MM:SS[.fff]; None for an empty or unreadable one.

    Args:
        stamp: as written.
        turn: rejected (E_TS_FORMAT) where the time cannot be read.
        findings: get what is found.
        unit: of plain numbers, s or ms.
        usual: how times are written; W_TS_FORMAT is noted about one that is not, and can be read.
    """
    stamp = stamp.strip()
    if not stamp:
        return None
    seconds = _seconds(stamp, unit)
    if seconds is None:
        reject(turn, findings, "E_TS_FORMAT", f"time {stamp!r} is not readable; write seconds or HH:MM:SS")
    elif not usual.fullmatch(stamp):
        flag(turn, findings, "W_TS_FORMAT", f"time {stamp!r} is read as {seconds:.2f} s")
    return seconds


def _seconds(stamp: str, unit: str) -> float | None:
    if re.fullmatch(NUMBER, stamp):
        number = float(stamp) / (1000 if unit == "ms" else 1)
        return number if abs(number) <= LONGEST else None
    parts = _CLOCK.fullmatch(stamp)
    if parts is None:
        return None
    hours, minutes, seconds, fraction = parts.groups()
    if int(seconds) > 59 or (hours is not None and int(minutes) > 59):
        return None
    if len(hours or "") > 4 or len(minutes) > 6:
        return None
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(f"{seconds}.{fraction or 0}")


def set_ends(turns: Sequence[Turn], findings: list[Finding]) -> None:
    """Give the turns of a session that have no end the start of the next one, and note those that stay open."""
    first: dict[str, Turn] = {}
    for turn in turns:
        first.setdefault(turn.id, turn)  # a turn that stands twice is not the next one of itself
    spoken = list(first.values())
    for turn, following in zip_longest(spoken, spoken[1:]):
        if is_rejected(turn.flags) or turn.clip is not None or turn.span is not None:
            continue
        if turn.start is None:
            flag(turn, findings, "W_TS_OPEN", "no start is given")
        elif following is None:
            flag(turn, findings, "W_TS_OPEN", "the last turn, and no end is given")
        elif following.start is None:
            flag(turn, findings, "W_TS_OPEN", f"no end: the time of the next turn, {following.id}, is not known")
        elif following.start > turn.start:
            turn.end = following.start
        else:
            _flag_backward(turn, following.id, turn.start, following.start, findings)


def _flag_backward(turn: Turn, following: str, start: float, after: float, findings: list[Finding]) -> None:
    span = f"{start:.2f} s, {following} at {after:.2f} s"
    if after == start:
        flag(turn, findings, "W_TS_ZERO", f"the next turn starts at the same time ({span})", (after, after))
    else:
        flag(turn, findings, "W_TS_OPEN", f"no end: the next turn starts earlier ({span})", (after, after))
