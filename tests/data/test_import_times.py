"""Times as people write them, and ends from the next start."""

import re

import pytest

from data.corpus.issues import Finding
from data.corpus.schema import Turn
from data.importers.timestamps import read_time, set_ends


def turn(number: int, start: float | None = None, end: float | None = None) -> Turn:
    return Turn(f"a/{number}", number, "client", "x", "change", start, end, where=f"f:{number}")


@pytest.mark.parametrize(
    ("stamp", "seconds"),
    [
        ("13", 13.0),
        (" 13.25 ", 13.25),
        (".5", 0.5),
        ("1e1", 10.0),
        ("-0.02", -0.02),
        ("01:05", 65.0),
        ("75:10", 4510.0),
        ("0:00:13", 13.0),
        ("01:00:02.500", 3602.5),
    ],
)
def test_usual_times_are_read_without_a_finding(stamp: str, seconds: float) -> None:
    findings: list[Finding] = []
    assert read_time(stamp, turn(0), findings) == seconds
    assert findings == []


@pytest.mark.parametrize(("stamp", "seconds"), [("00:00:010", 10.0), ("00:00:13,5", 13.5), ("000:01:00", 60.0)])
def test_odd_times_are_read_and_flagged(stamp: str, seconds: float) -> None:
    findings: list[Finding] = []
    own = turn(0)
    assert read_time(stamp, own, findings) == seconds
    assert own.flags == ("W_TS_FORMAT",)
    assert stamp in findings[0].message
    assert own.label == "change"


@pytest.mark.parametrize("stamp", ["soon", "00:60:00", "00:00:61", "1,234", "nan", "inf", "1e999", "1_0", "1:2:3:4"])
def test_unreadable_times_reject_the_turn(stamp: str) -> None:
    findings: list[Finding] = []
    own = turn(0)
    assert read_time(stamp, own, findings) is None
    assert (own.flags, own.label) == (("E_TS_FORMAT",), None)
    assert repr(stamp) in findings[0].message


def test_nothing_is_no_time_and_plain_numbers_may_be_milliseconds() -> None:
    findings: list[Finding] = []
    assert read_time("  ", turn(0), findings) is None
    assert read_time("1500", turn(0), findings, "ms") == 1.5
    assert read_time("00:02", turn(0), findings, "ms") == 2.0
    assert read_time("13", turn(0), findings, usual=re.compile("..:..:..")) == 13.0
    assert [finding.code for finding in findings] == ["W_TS_FORMAT"]


def test_ends_follow_from_the_next_start_where_none_is_given() -> None:
    turns = [turn(0, 0), turn(1, 2, 3), turn(2, 4), turn(3, 4), turn(4, 3), turn(5, 9), turn(6), turn(7, 11)]
    findings: list[Finding] = []
    set_ends(turns, findings)
    assert [own.end for own in turns] == [2, 3, None, None, 9, None, None, None]
    said = {finding.utterance: (finding.code, finding.message) for finding in findings}
    assert {name: code for name, (code, _) in said.items()} == {
        "a/2": "W_TS_ZERO",
        "a/3": "W_TS_OPEN",
        "a/5": "W_TS_OPEN",
        "a/6": "W_TS_OPEN",
        "a/7": "W_TS_OPEN",
    }
    assert [said[name][1].split("(")[0] for name in ("a/3", "a/5", "a/6", "a/7")] == [
        "the turn has no end, and the next turn starts earlier ",
        "the turn has no end, and the next turn, a/6, has no start",
        "the turn has no start",
        "the last turn has no end",
    ]


def test_a_turn_that_stands_twice_does_not_end_where_it_starts() -> None:
    turns = [turn(0, 0), turn(1, 2), turn(1, 2), turn(2, 5, 6), turn(0, 0)]
    findings: list[Finding] = []
    set_ends(turns, findings)
    assert [own.end for own in turns[:2]] == [2, 5]
    assert findings == []
