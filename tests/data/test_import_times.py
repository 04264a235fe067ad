"""Times in usual and unusual formats, and ends that follow from the next start."""

import re

import pytest

from data.corpus.issues import Finding
from data.corpus.schema import Turn
from data.importers.base.timestamps import read_time, set_ends


def turn(number: int, start: float | None = None, end: float | None = None) -> Turn:
    return Turn(f"a/{number}", number, "client", "x", "change", start, end, where=f"f:{number}")


@pytest.mark.parametrize(
    ("stamps", "times", "flags"),
    [
        (
            "13| 13.25 |.5|1e1|-0.02|01:05|75:10|0:00:13|01:00:02.500",
            [13, 13.25, 0.5, 10, -0.02, 65, 4510, 13, 3602.5],
            (),
        ),
        ("00:00:010|00:00:13,5|000:01:00", [10, 13.5, 60], ("W_TS_FORMAT",)),
        ("soon|00:60:00|00:00:61|1,234|inf|1e999|1_0|1:2:3:4|1e7|99999:00:00", [None] * 10, ("E_TS_FORMAT",)),
    ],
    ids=["usual", "odd", "unreadable"],
)
def test_times_are_parsed_and_flagged(stamps: str, times: list[float | None], flags: tuple[str, ...]) -> None:
    for stamp, seconds in zip(stamps.split("|"), times, strict=True):
        findings: list[Finding] = []
        spoken = turn(0)
        assert read_time(stamp, spoken, findings) == seconds
        assert (spoken.flags, spoken.label) == (flags, None if seconds is None else "change")
        assert [finding.code for finding in findings] == list(flags)
        assert all(repr(stamp) in finding.message for finding in findings)


def test_empty_time_is_none_and_units_may_be_milliseconds() -> None:
    findings: list[Finding] = []
    assert [read_time(word, turn(0), findings) for word in ("  ", "nan", "NaT", "None", "n/a")] == [None] * 5
    assert read_time("1500", turn(0), findings, "ms") == 1.5
    assert read_time("00:02", turn(0), findings, "ms") == 2.0
    assert read_time("13", turn(0), findings, usual=re.compile("..:..:..")) == 13.0
    assert [finding.code for finding in findings] == ["W_TS_FORMAT"]


def test_missing_ends_are_the_next_starts() -> None:
    turns = [turn(0, 0), turn(1, 2, 3), turn(2, 4), turn(3, 4), turn(4, 3), turn(5, 9), turn(6), turn(7, 11)]
    findings: list[Finding] = []
    set_ends(turns, findings)
    assert [spoken.end for spoken in turns] == [2, 3, None, None, 9, None, None, None]
    assert [(finding.utterance, finding.code, finding.message.split(" (")[0]) for finding in findings] == [
        ("a/2", "W_TS_ZERO", "the next turn starts at the same time"),
        ("a/3", "W_TS_OPEN", "the turn has no end, and the next turn starts earlier"),
        ("a/5", "W_TS_OPEN", "the turn has no end, and the next turn, a/6, has no start"),
        ("a/6", "W_TS_OPEN", "the turn has no start"),
        ("a/7", "W_TS_OPEN", "the last turn has no end"),
    ]


def test_duplicate_turn_is_not_the_next_turn() -> None:
    turns = [turn(0, 0), turn(1, 2), turn(1, 2), turn(2, 5, 6), turn(0, 0)]
    findings: list[Finding] = []
    set_ends(turns, findings)
    assert [spoken.end for spoken in turns[:2]] == [2, 5]
    assert findings == []
