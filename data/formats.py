"""The formats of everything that people read: numbers, intervals, durations, sizes and hours, each in one place."""

import html
from collections.abc import Sequence


def format_number(value: object, digits: int = 3) -> str:
    """Return a float with a fixed number of digits; an empty string for anything else, such as a missing metric."""
    return f"{value:.{digits}f}" if isinstance(value, float) else ""


def format_interval(value: float, low: float | None, high: float | None) -> str:
    """Return a value and its limits, "0.985 [0.971, 0.998]"; the value alone where it has no limits."""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def format_narrow_interval(value: float, low: float | None, high: float | None, digits: int = 3) -> str:
    """Return the same for the column of a table, "0.985 [0.97,1.00]"."""
    limits = "" if low is None or high is None else f" [{low:.2f},{high:.2f}]"
    return f"{value:.{digits}f}{limits}"


def format_value(value: object) -> str:
    """Return the value of a setting: floats with three significant digits, booleans as yes or no, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value)) or "none"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value == 0 or abs(value) >= 0.01 else f"{value:.2e}"


def format_count(count: int, noun: str) -> str:
    """Return "1 trial" or "4 trials"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_list(items: Sequence[str]) -> str:
    """Return items as a phrase: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def format_rank(rank: int) -> str:
    """Return a rank as an English ordinal: "1st", "2nd", "11th"."""
    suffix = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{suffix}"


def format_duration(seconds: float) -> str:
    """Return a duration in its natural unit: "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def format_hours(hours: float, device: str) -> str:
    """Return hours of a device, "1.25 GPU-hours"."""
    return f"{hours:.3g} {device}-hours"


def format_bytes(size: int) -> str:
    """Return a size in MB, GB or TB."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{max(1, round(size / 10**6))} MB"


def markdown_text(text: str) -> str:
    """Escape text that may hold markup, line breaks or the border of a cell."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
