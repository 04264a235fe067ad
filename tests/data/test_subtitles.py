"""Subtitles as people have them: variations of SRT and WebVTT, and words with times."""

from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig
from data.importers import IMPORTERS

ROLES = {"ann": "therapist", "bob": "client", "speaker 0": "therapist", "speaker 1": "client", "o'neil": "client"}
TWO = [("therapist", "hi", 1.0, 2.0), ("client", "yo", 3.5, 4.0)]
VARIATIONS = {
    "an empty cue": (
        "srt",
        "1\n00:01,000 --> 00:02,000\nAnn: hi\n\n2\n00:02,000 --> 00:03,000\n\n3\n00:03,500 --> 00:04,000\nBob: yo",
    ),
    "no numbers": ("srt", "00:00:01,000 --> 00:00:02,000\nAnn: hi\n\n00:00:03,500 --> 00:00:04,000\nBob: yo\n"),
    "no empty lines": ("srt", "1\n00:00:01,000 --> 00:00:02,000\nAnn: hi\n2\n00:00:03,500 --> 00:00:04,000\nBob: yo"),
    "no hours": ("srt", "1\n00:01,000 --> 00:02,000\nAnn: hi\n\n2\n00:03,500 --> 00:04,000\nBob: yo\n"),
    "two digits": ("srt", "1\n0:00:01,00 --> 0:00:02,00\nAnn: hi\n\n2\n0:00:03,50 --> 0:00:04,00\nBob: yo\n"),
    "no header": ("vtt", "1\n00:00:01.000 --> 00:00:02.000\nAnn: hi\n\n2\n00:00:03.500 --> 00:00:04.000\nBob: yo\n"),
    "decimal commas": ("vtt", "WEBVTT\n\n00:01,000 --> 00:02,000\nAnn: hi\n\n00:03,500 --> 00:04,000\nBob: yo\n"),
    "whisper.cpp": ("srt", "1\n00:01,000 --> 00:02,000\n(speaker 0) hi\n\n2\n00:03,500 --> 00:04,000\n(speaker 1)yo\n"),
    "chevrons": ("srt", "1\n00:01,000 --> 00:02,000\n>> ANN: hi\n\n2\n00:03,500 --> 00:04,000\n&gt;&gt; Bob: yo\n"),
    "wide colons": ("srt", "1\n00:01,000 --> 00:02,000\nAnn\uff1ahi\n\n2\n00:03,500 --> 00:04,000\nBob\uff1a yo\n"),
    "entities": (
        "vtt",
        "WEBVTT\n\n00:01.000 --> 00:02.000\n<v Ann>hi</v>\n\n00:03.500 --> 00:04.000\n<v O&apos;Neil>yo",
    ),
}


def read(path: Path, text: str, **roles: str) -> list[tuple[str, str, float | None, float | None]]:
    path.write_text(text, encoding="utf-8")
    corpus = IMPORTERS["subtitles"].read(path, None, CorpusConfig(roles=ROLES | roles))
    return [(turn.speaker, turn.text, turn.start, turn.end) for turn in corpus.conversations[0].turns]


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_of_subtitles_have_the_same_turns(name: str, tmp_path: Path) -> None:
    suffix, text = VARIATIONS[name]
    assert read(tmp_path / f"a.{suffix}", text) == TWO


def test_milliseconds_that_are_not_padded_are_counted(tmp_path: Path) -> None:
    text = "1\n00:00:01,5 --> 00:00:02,120\nAnn: hi\n\n2\n00:00:03,50 --> 00:00:04,0\nBob: yo\n"
    assert [row[2:] for row in read(tmp_path / "a.srt", text)] == [(1.005, 2.12), (3.05, 4.0)]


def test_voices_of_one_line_are_separate_turns(tmp_path: Path) -> None:
    """A voice without a name, or ">>", is another speaker, whose name is not known."""
    text = "WEBVTT\n\n00:01.000 --> 00:02.000\n<v Ann>hi</v> <v Bob>yo</v>\n\n00:03.000 --> 00:04.000\n<v >who</v>\n"
    assert [row[:2] for row in read(tmp_path / "a.vtt", text)] == [
        ("therapist", "hi"),
        ("client", "yo"),
        ("unknown", "who"),
    ]
    text = "1\n00:01,000 --> 00:02,000\nAnn: hi\n\n2\n00:03,000 --> 00:04,000\n>> who\n"
    assert [row[:2] for row in read(tmp_path / "a.srt", text)] == [("therapist", "hi"), ("unknown", "who")]


def test_names_that_begin_every_cue_are_speakers(tmp_path: Path) -> None:
    """Although each occurs once, and a second line of a cue has another colon."""
    text = "1\n00:01,000 --> 00:02,000\nDr Lee: hi\nthere\n\n2\n00:03,000 --> 00:04,000\nSam: yo\nI said: no\n"
    found = read(tmp_path / "a.srt", text, **{"dr lee": "therapist"})
    assert [row[:2] for row in found] == [("therapist", "hi there"), ("unknown", "yo I said: no")]


def test_rolling_captions_without_tags_are_read_once(tmp_path: Path) -> None:
    """As converted to SRT: each line comes twice, the second time above the next one."""
    lines = ["one two", "three four", "five six", "seven eight"]
    cues = [f"00:0{n},000 --> 00:0{n + 1},000\n{lines[n - 1]}\n{lines[n]}\n" for n in range(1, 4)]
    (tmp_path / "a.rttm").write_text("SPEAKER a 1 0 9 <NA> <NA> ann <NA> <NA>\n")
    text = "\n".join(["00:00,000 --> 00:01,000\none two\n", *cues])
    assert [row[1] for row in read(tmp_path / "a.srt", text)] == lines


def test_captions_are_split_at_words_with_times(tmp_path: Path) -> None:
    text = "WEBVTT\n\n00:00:01.000 --> 00:00:03.000\nwhy<00:00:01.500><c> now?</c><00:00:02.000><c> I must.</c>\n"
    rows = ["SPEAKER a 1 0.9 1.1 <NA> <NA> ann <NA> <NA>", "SPEAKER a 1 2 1 <NA> <NA> bob <NA> <NA>"]
    (tmp_path / "a.rttm").write_text("\n".join(rows))
    expected = [("therapist", "why now?", 1.0, 2.0), ("client", "I must.", 2.0, 3.0)]
    assert read(tmp_path / "a.vtt", text) == expected
