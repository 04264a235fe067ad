"""Parse times, and derive missing ends from the start of the next turn."""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from data.corpus.issues import Finding
from data.corpus.schema import Turn, flag, is_rejected, reject
from data.importers.base.cells import MISSING, clean_code

UNITS = {"s": (1, 1), "ms": (1, 1000), "d": (86_400, 1)}  # factor and divisor to seconds; Excel stores times in days
_DECIMAL_COMMA = re.compile(r"[+-]?(?:\d+,(?:\d{1,2}|\d{4,})|0\d*,\d+)")
LONGEST = 1e6  # s; a larger number cannot be a time in a session
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
USUAL = re.compile(rf"{NUMBER}|(?:\d{{1,2}}:)?\d{{1,2}}:\d\d(?:\.\d+)?")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+)(?:[.,](\d+))?")


def read_time(
    stamp: str, turn: Turn, findings: list[Finding], unit: str = "s", usual: re.Pattern[str] = USUAL
) -> float | None:
    """Return the seconds of a time, a plain number or [HH:]MM:SS[.fff]; None if it is missing or cannot be parsed.

    Args:
        stamp: the time as written.
        turn: the turn; it is rejected (E_TS_FORMAT) if the time cannot be parsed.
        findings: the list that findings are added to.
        unit: unit of plain numbers: s, ms or d (days).
        usual: the usual format; a time of another format is flagged (W_TS_FORMAT).
    """
    stamp = stamp.strip()
    if clean_code(stamp) in MISSING:
        return None
    seconds = seconds_of(stamp, unit)
    if seconds is None:
        reject(turn, findings, "E_TS_FORMAT", f"time {stamp!r} cannot be parsed; write seconds or HH:MM:SS")
    elif not usual.fullmatch(stamp):
        flag(turn, findings, "W_TS_FORMAT", f"time {stamp!r} is parsed as {seconds:.2f} s")
    return seconds


def has_decimal_commas(stamps: Iterable[str]) -> bool:
    """Return whether times such as 1,5 have a decimal comma; 1,234 alone may be a thousand or a second."""
    return any(_DECIMAL_COMMA.fullmatch(stamp.strip()) for stamp in stamps)


def start_order(stamps: Sequence[str], unit: str = "s") -> list[int]:
    """Return the positions of turns in the order of their starts; one without a start stays behind the one before it.

    Args:
        stamps: starts as written.
        unit: unit of plain numbers, as for `read_time`.
    """
    keys, latest = [], -math.inf
    for stamp in stamps:
        start = seconds_of(stamp.strip(), unit)
        latest = latest if start is None else start
        keys.append(latest)
    return sorted(range(len(keys)), key=keys.__getitem__)


def note_order(order: Sequence[int], conversation: str, wheres: Sequence[str], findings: list[Finding]) -> None:
    """Add a finding about a session whose rows were not in the order of their times or numbers.

    Args:
        order: positions of the rows in the order of the conversation.
        conversation: id of the session.
        wheres: "file:line" of every row.
        findings: the list that findings are added to.
    """
    moved = [position for position, row in enumerate(order) if position != row]
    if moved:
        message = f"{len(moved)} of {len(order)} turns are in another order, the first is at {wheres[order[moved[0]]]}"
        findings.append(Finding("W_TS_SORTED", wheres[moved[0]], conversation, message))


def seconds_of(stamp: str | float, unit: str = "s") -> float | None:
    """Return the seconds of a time as written, in a unit, or as [HH:]MM:SS[.fff]; a number is in seconds already.

    Returns:
        None if the time is missing, cannot be parsed, or is none in a session.
    """
    if isinstance(stamp, float):
        return stamp if abs(stamp) <= LONGEST else None
    if re.fullmatch(NUMBER, stamp):
        factor, divisor = UNITS[unit]
        number = float(stamp) * factor / divisor
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
    """Set missing ends of the turns of a session to the start of the next turn, and flag turns that stay open."""
    first: dict[str, Turn] = {}
    for turn in turns:
        first.setdefault(turn.id, turn)  # a duplicate row is not the next turn
    spoken = list(first.values())
    for turn, following in zip_longest(spoken, spoken[1:]):
        if is_rejected(turn.flags) or turn.clip is not None or turn.span is not None:
            continue
        if turn.start is None:
            flag(turn, findings, "W_TS_OPEN", "the turn has no start")
        elif following is None:
            flag(turn, findings, "W_TS_OPEN", "the last turn has no end")
        elif following.start is None:
            flag(turn, findings, "W_TS_OPEN", f"the turn has no end, and the next turn, {following.id}, has no start")
        elif following.start > turn.start:
            turn.end = following.start
        else:
            _flag_backward(turn, following.id, turn.start, following.start, findings)


def _flag_backward(turn: Turn, following: str, start: float, after: float, findings: list[Finding]) -> None:
    span = f"{start:.2f} s, {following} at {after:.2f} s"
    if after == start:
        flag(turn, findings, "W_TS_ZERO", f"the next turn starts at the same time ({span})", (after, after))
    else:
        flag(
            turn,
            findings,
            "W_TS_OPEN",
            f"the turn has no end, and the next turn starts earlier ({span})",
            (after, after),
        )
