"""Transcripts of recognisers and of people: subtitles, JSON of many programs, RTTM, plain text and Word."""

import json
from collections.abc import Iterator
from pathlib import Path

import docx
import pytest

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers import IMPORTERS, guess_format

ROLES = {"ann": "therapist", "bob": "client", "spk_0": "therapist", "spk_1": "client"}
ROLES |= {"speaker_1": "therapist", "speaker_2": "client", "speaker_0": "therapist"}
Row = tuple[str, str, float | None, float | None]  # speaker, text, start, end


def read(path: Path, **config: object) -> Corpus:
    settings = CorpusConfig.model_validate({"roles": ROLES} | config)
    return IMPORTERS[guess_format(path)].read(path, None, settings)


def rows(corpus: Corpus) -> Iterator[Row]:
    for turn in (turn for conversation in corpus.conversations for turn in conversation.turns):
        yield turn.speaker, turn.text, turn.start, turn.end


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def words(*said: tuple[str, float, object]) -> list[dict[str, object]]:
    return [{"word": word, "start": start, "end": start + 0.5, "speaker": speaker} for word, start, speaker in said]


SAID: list[Row] = [("therapist", "why now?", 1.0, 2.0), ("client", "I must.", 2.0, 3.0)]
AWS_ITEMS = [
    {"type": "pronunciation", "start_time": "1.0", "end_time": "1.5", "alternatives": [{"content": "why"}]},
    {"type": "pronunciation", "start_time": "1.5", "end_time": "2.0", "alternatives": [{"content": "now"}]},
    {"type": "punctuation", "alternatives": [{"content": "?"}]},
    {"type": "pronunciation", "start_time": "2.0", "end_time": "2.5", "alternatives": [{"content": "I"}]},
    {"type": "pronunciation", "start_time": "2.5", "end_time": "3.0", "alternatives": [{"content": "must"}]},
    {"type": "punctuation", "alternatives": [{"content": "."}]},
]
AWS_SPEAKERS = [
    {"speaker_label": "spk_0", "items": [{"start_time": "1.0"}, {"start_time": "1.5"}]},
    {"speaker_label": "spk_1", "items": [{"start_time": "2.0"}, {"start_time": "2.5"}]},
]
SEGMENT = [
    {"start_time": "1.0", "end_time": "2.0", "transcript": "why now?", "speaker_label": "spk_0"},
    {"start_time": "2.0", "end_time": "3.0", "transcript": "I must.", "speaker_label": "spk_1"},
]
DEEPGRAM = [
    {"word": "why", "punctuated_word": "why", "start": 1.0, "end": 1.5, "speaker": 0},
    {"word": "now", "punctuated_word": "now?", "start": 1.5, "end": 2.0, "speaker": 0},
    {"word": "i", "punctuated_word": "I", "start": 2.0, "end": 2.5, "speaker": 1},
    {"word": "must", "punctuated_word": "must.", "start": 2.5, "end": 3.0, "speaker": 1},
]
GOOGLE = [
    {"word": word, "startTime": f"{1 + place / 2}s", "endTime": f"{1.5 + place / 2}00s", "speakerTag": 1 + place // 2}
    for place, word in enumerate(("why", "now?", "I", "must."))
]
ASSEMBLY = [
    {"text": word, "start": 1000 + 500 * place, "end": 1500 + 500 * place, "speaker": "AB"[place // 2]}
    for place, word in enumerate(("why", "now?", "I", "must."))
]
TWO = [("why now?", 1.0, 1), ("I must.", 2.0, 2)]
SHAPES = {
    "aws items": {"results": {"transcripts": [], "items": AWS_ITEMS, "speaker_labels": {"segments": AWS_SPEAKERS}}},
    "aws segments": {"results": {"transcripts": [], "items": AWS_ITEMS, "audio_segments": SEGMENT}},
    "deepgram words": {"results": {"channels": [{"alternatives": [{"words": DEEPGRAM}]}]}},
    "assemblyai words": {"words": ASSEMBLY},
    "google": {"results": [{"alternatives": [{"transcript": "why now"}]}, {"alternatives": [{"words": GOOGLE}]}]},
    "azure batch": {
        "recognizedPhrases": [
            {"speaker": who, "offsetInTicks": start * 1e7, "durationInTicks": 1e7, "nBest": [{"display": text}]}
            for text, start, who in TWO
        ]
    },
    "azure fast": {
        "phrases": [
            {"speaker": who, "offsetMilliseconds": start * 1000, "durationMilliseconds": 1000, "text": text}
            for text, start, who in TWO
        ]
    },
    "nemo": "\n".join(
        json.dumps(
            {"audio_filepath": "a.wav", "offset": start, "duration": 1.0, "text": text, "label": f"speaker_{who}"}
        )
        for text, start, who in TWO
    ),
}
DEEPGRAM_ROLES = {"speaker_0": "therapist", "speaker_1": "client", "A": "therapist", "B": "client"}


@pytest.mark.parametrize("shape", SHAPES)
def test_json_of_every_recogniser_has_the_same_turns(shape: str, tmp_path: Path) -> None:
    others = {"roles": DEEPGRAM_ROLES} if shape in ("deepgram words", "assemblyai words") else {}
    assert list(rows(read(write(tmp_path / "a.json", SHAPES[shape]), **others))) == SAID


RTTM = "SPEAKER a 1 0.9 1.1 <NA> <NA> ann <NA> <NA>\nSPEAKER a 1 2.0 5 <NA> <NA> bob <NA> <NA>\n"
WHISPER = {"segments": [{"start": 1.0, "end": 2.0, "text": "why now?"}, {"start": 2.0, "end": 3.0, "text": "I must."}]}
WORDS = words(("why", 1.0, None), ("now?", 1.5, None), ("I", 2.0, None), ("must.", 2.5, None))
CPP = [{"offsets": {"from": start * 1000, "to": start * 1000 + 1000}, "text": text} for text, start, _ in TWO]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", WHISPER, "output of WhisperX or Whisper"),
        ("a.json", {"segments": [{"start": 1.0, "end": 3.0, "text": "why now? I must.", "words": WORDS}]}, "output"),
        ("a.json", {"transcription": CPP}, "output of whisper.cpp"),
        (
            "a.srt",
            "1\n00:00:01,000 --> 00:00:02,000\nwhy now?\n\n2\n00:00:02,000 --> 00:00:03,000\nI must.\n",
            "subtitles",
        ),
    ],
)
def test_rttm_says_who_speaks(name: str, content: object, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"^{name}: {kind}.* without speakers; put .*a\.rttm, or transcribe"):
        read(path)
    write(tmp_path / "a.rttm", RTTM)
    assert list(rows(read(path))) == SAID
    write(tmp_path / "a.rttm", "SPEAKER a 1 x\n")
    with pytest.raises(DataError, match=r"^a\.rttm:1: not a row of RTTM"):
        read(path)


def test_other_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "a.json", {"utterances": [{"text": "hi", "start": 0, "end": 9, "speaker": "ann"}]})
    write(tmp_path / "a" / "meta.json", {"model": "large"})
    corpus = read(tmp_path)
    assert [conversation.id for conversation in corpus.conversations] == ["a"]
    assert [(finding.code, finding.where) for finding in corpus.findings] == [("W_FILE_OTHER", "meta.json")]
    with pytest.raises(DataError, match=r"^meta\.json:1: no segments of a recogniser that is known .*it has model"):
        IMPORTERS["recogniser"].read(tmp_path / "a" / "meta.json", None, CorpusConfig())


VTT = """WEBVTT - from Teams

NOTE Ann: a note --> not a cue

00:01.000 --> 00:02.000
<v Ann>why <b>now</b> &amp; here?</v>

b
00:02.000 --> 00:03.500 align:start
<v.loud Bob>I told her: stop.</v>
It was hard.

00:00:04.000 --> 00:00:05.000
Ann: go on
- Bob: and on
"""


def test_cues_are_cut_at_their_speakers(tmp_path: Path) -> None:
    assert list(rows(read(write(tmp_path / "a.vtt", VTT)))) == [
        ("therapist", "why now & here?", 1.0, 2.0),
        ("client", "I told her: stop. It was hard.", 2.0, 3.5),
        ("therapist", "go on", 4.0, 5.0),
        ("client", "and on", 4.0, 5.0),
    ]


def test_rolling_captions_are_read_once(tmp_path: Path) -> None:
    """YouTube shows each line a second time above the next one."""
    cue = "00:00:0{}.000 --> 00:00:0{}.000\n{}\n\n"
    text = (
        "WEBVTT\n\n" + cue.format(1, 2, "why<00:00:01.500><c> now?</c>") + cue.format(2, 3, "why now?\nI<c> must.</c>")
    )
    write(tmp_path / "a.rttm", RTTM)
    assert list(rows(read(write(tmp_path / "a.vtt", text)))) == SAID


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "WEBVTT\n\n00:01.000 -> 00:02.000\nx\n\n00:xx --> 00:03.000\ny\n",
            r"^a\.vtt:6: '00:xx --> .*' is no time of a cue",
        ),
        ("hello\n", r"^a\.vtt:1: not readable as VTT"),
        ("WEBVTT\n", r"^a\.vtt:1: no turns"),
    ],
)
def test_broken_subtitles_are_refused_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.vtt", text)
    with pytest.raises(DataError, match=message):
        IMPORTERS["subtitles"].read(tmp_path / "a.vtt", None, CorpusConfig())


TYPED = {
    "times in front": ("[00:01] T: why\n[0:00:02,5] C: hm: yes\n", [(1.0, 2.5), (2.5, None)]),
    "times behind": ("Ann (00:01): why\nBob (00:02): hm: yes\n", [(1.0, 2.0), (2.0, None)]),
    "numbers": ("Session 3, 2021\n\n1. T: why\n2. C: hm: yes\n", [(None, None)] * 2),
    "numbered turns": ("T1: why\nC1: hm:\nyes\nT2: so\nC2: ok\nT3: x\n", [(None, None)] * 5),
    "tabs": ("Therapist\twhy\nClient\thm: yes\n", [(None, None)] * 2),
    "names once": ("Dr Lee: why\nSam: hm: yes\n", [(None, None)] * 2),
    "Markdown": ("**T:** why\n__C__: hm: yes\n", [(None, None)] * 2),
    "full-width colons": ("T\uff1a why\nC\uff1a hm: yes\n", [(None, None)] * 2),
    "above": ("Dr Lee  0:01\nwhy\n\nSam  0:02\nhm: yes\n\nDr Lee  0:03\nso\n", [(1.0, 2.0), (2.0, 3.0), (3.0, None)]),
    "time above": ("00:01 --> 00:02\nT: why\n00:02\nC: hm: yes\n", [(1.0, 2.0), (2.0, None)]),
    "lines of their own": ("Therapist\nwhy\nClient\nhm: yes\n", [(None, None)] * 2),
    "no colons": ("T1 why\nC1 hm: yes\nT2 so\nC2 ok\n", [(None, None)] * 4),
    "dashes": ("T \u2013 why\nC \u2013 hm: yes\n", [(None, None)] * 2),
    "line numbers": ("1 T: why\n2 C: hm:\n3 yes\n", [(None, None)] * 2),
    "heading": ("Session: 5\nDate: May\nClient: Al\n\nT: why\nC: hm: yes\n", [(None, None)] * 2),
    "heading at once": ("Session: 5\nT: why\nC: hm: yes\n", [(None, None)] * 2),
    "bullets": ("- Ann: why\n- Bob: hm: yes\n", [(None, None)] * 2),
}


@pytest.mark.parametrize("kind", TYPED)
def test_typed_transcripts_have_their_speakers(kind: str, tmp_path: Path) -> None:
    text, times = TYPED[kind]
    corpus = IMPORTERS["dialogue"].read(
        write(tmp_path / "a.txt", text),
        None,
        CorpusConfig(roles=ROLES | {"Dr Lee": "therapist", "sam": "client"}),
    )
    found = list(rows(corpus))
    assert [row[:2] for row in found[:2]] == [("therapist", "why"), ("client", "hm: yes")]
    assert [row[2:] for row in found] == times
    assert {finding.code for finding in corpus.findings} <= {"W_TS_OPEN"}


def test_word_files_are_read_as_text_or_table(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_heading("Session 1")
    for text in ("T: why", "C: hm:\nyes", "it was", "T: so"):
        document.add_paragraph(text)
    document.save(str(tmp_path / "a.docx"))
    table = docx.Document()
    grid = table.add_table(rows=2, cols=3)
    for row, cells in zip(grid.rows, (("00:01", "T", "why"), ("00:02", "C", "hm: yes")), strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    table.save(str(tmp_path / "b.docx"))
    assert list(rows(read(tmp_path))) == [
        ("therapist", "why", None, None),
        ("client", "hm: yes it was", None, None),
        ("therapist", "so", None, None),
        ("therapist", "why", 1.0, 2.0),
        ("client", "hm: yes", 2.0, None),
    ]
    write(tmp_path / "b.docx", "no zip")
    with pytest.raises(DataError, match=r"^b\.docx: not readable as Word"):
        IMPORTERS["dialogue"].read(tmp_path / "b.docx", None, CorpusConfig())


def test_numbers_and_times_that_continue_a_turn_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "T: when\nC: I began\n10 years ago\n12:30 was late\nT: so\n")
    assert [row[1] for row in rows(read(tmp_path))] == ["when", "I began 10 years ago 12:30 was late", "so"]


def test_codes_at_the_end_of_turns_need_a_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "T: why (OQ)\nC: yes (CT) (at\nlast)\nT: so (SR) (AF)\n")
    plain, coded = (
        IMPORTERS["dialogue"].read(path, None, CorpusConfig(line_codes=brackets)).conversations[0].turns
        for brackets in (None, "()")
    )
    assert [(turn.text, turn.label) for turn in plain][::2] == [("why (OQ)", None), ("so (SR) (AF)", None)]
    assert [(turn.text, turn.label) for turn in coded][::2] == [("why", "oq"), ("so", "sr|af")]
    write(path, "T: why [OQ]\nC: yes\n")
    [turn, _] = IMPORTERS["dialogue"].read(path, None, CorpusConfig(line_codes="[]")).conversations[0].turns
    assert (turn.text, turn.label) == ("why", "oq")


def test_word_files_have_bold_names_and_columns(tmp_path: Path) -> None:
    bold = docx.Document()
    for name, text in (("Therapist", "why"), ("Client", "hm: yes")):
        paragraph = bold.add_paragraph()
        paragraph.add_run(name).bold = True
        paragraph.add_run(f" {text}")
    bold.save(str(tmp_path / "a.docx"))
    table = docx.Document()
    grid = table.add_table(rows=3, cols=4)
    content = (("Nr", "Who", "Text", "Code"), ("1", "T", "why", "OQ"), ("2", "C", "hm: yes", ""))
    for row, cells in zip(grid.rows, content, strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    table.save(str(tmp_path / "b.docx"))
    corpus = read(tmp_path)
    assert [row[:2] for row in rows(corpus)] == [("therapist", "why"), ("client", "hm: yes")] * 2
    assert [turn.label for turn in corpus.conversations[1].turns] == ["oq", None]


def test_text_without_speakers_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "once upon a time\nthere was: nothing\n")
    with pytest.raises(DataError, match=r"^a\.txt:1: no line begins with a speaker; write each turn as"):
        IMPORTERS["dialogue"].read(path, None, CorpusConfig())
    with pytest.raises(DataError, match="no format recognises it"):
        guess_format(path)
