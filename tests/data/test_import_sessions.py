"""Formats with one file per session: WhisperX, DAIC and MI-TAGS, in different folder layouts."""

import json
from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig
from data.errors import DataError
from data.importers.tables.daic import read_daic
from data.importers.tables.mi_tags import read_mi_tags
from data.importers.transcripts.recognisers import read_whisperx

ROLES = CorpusConfig(roles={"SPEAKER_00": "therapist", "SPEAKER_01": "client", "b/SPEAKER_00": "client"})
DAIC = "start_time\tstop_time\tspeaker\tvalue\n1.5\t2.25\tEllie\thi, there\n2.5\t3\tParticipant\t<laughter> hello\n"
CODED = "turn,speaker,text,code,annotator\n"


def whisper(path: Path, *segments: object) -> None:
    path.write_text(json.dumps({"segments": segments}), encoding="utf-8")


def test_roles_of_a_single_session_can_be_set(tmp_path: Path) -> None:
    segment = {"start": 0.5, "end": 1.5, "text": " hi", "speaker": "SPEAKER_00"}
    whisper(tmp_path / "a.json", segment)
    whisper(tmp_path / "b.json", segment)
    corpus = read_whisperx(tmp_path, None, ROLES)
    assert [(one.id, one.turns[0].speaker) for one in corpus.conversations] == [("a", "therapist"), ("b", "client")]


def test_segments_without_speaker_or_times_keep_their_text(tmp_path: Path) -> None:
    whisper(
        tmp_path / "a.json",
        {"start": 0.0, "end": 1.0, "text": "who?", "label": "x"},
        {"text": "1984", "speaker": "SPEAKER_00", "label": ["B", "a"]},
        {"start": 3, "text": "end", "speaker": "SPEAKER_01", "label": "Change "},
    )
    corpus = read_whisperx(tmp_path / "a.json", None, ROLES)
    (conversation,) = corpus.conversations
    assert [(turn.speaker, turn.text, turn.label) for turn in conversation.turns] == [
        ("unknown", "who?", None),
        ("therapist", "1984", "b|a"),
        ("client", "end", "change"),
    ]
    assert [(finding.code, finding.where) for finding in corpus.findings] == [
        ("E_SPEAKER", "a.json:segments[0]"),
        ("W_TS_OPEN", "a.json:segments[1]"),
        ("W_TS_OPEN", "a.json:segments[2]"),
    ]
    assert corpus.labels == ("change", "a", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"segments": [\n  {"text": "a",}\n]}', r"^a\.json:2: not readable as JSON \(column \d+"),
        ('{"segments": []}', r"^a\.json:1: no turns"),
        ("[]", r"^a\.json:1: no segments"),
        ('{"segments": [{"text": "a"}, {"start": 1}]}', r"^a\.json:segments\[1\]: the segment has no text"),
    ],
)
def test_invalid_json_is_refused_with_its_position(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_whisperx(tmp_path, None, ROLES)


def test_daic_recordings_may_be_beside_transcripts(tmp_path: Path) -> None:
    for name in ("300", "301"):
        (tmp_path / f"{name}_P").mkdir()
        (tmp_path / f"{name}_P" / f"{name}_TRANSCRIPT.csv").write_text(DAIC, encoding="utf-8")
    (tmp_path / "300_P" / "300_AUDIO.wav").touch()
    corpus = read_daic(tmp_path, None, CorpusConfig())
    assert [(one.id, one.recording) for one in corpus.conversations] == [
        ("300", tmp_path / "300_P" / "300_AUDIO.wav"),
        ("301", None),
    ]
    first, second = corpus.conversations[0].turns
    assert (first.speaker, first.text, first.span, first.where) == (
        "therapist",
        "hi, there",
        (1.5, 2.25),
        "300_TRANSCRIPT.csv:2",
    )
    assert (second.speaker, second.label) == ("client", None)
    assert corpus.labels == ()


def test_daic_recordings_may_be_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    audio = tmp_path / "audio"
    (audio / "301_P").mkdir(parents=True)
    for name in ("300", "301", "302"):
        (tmp_path / "text" / f"{name}_TRANSCRIPT.csv").write_text(DAIC, encoding="utf-8")
    for path in (audio / "300_AUDIO.wav", audio / "301_P" / "301_AUDIO.flac"):
        path.touch()
    corpus = read_daic(tmp_path / "text", audio, CorpusConfig())
    assert [one.recording for one in corpus.conversations] == [
        audio / "300_AUDIO.wav",
        audio / "301_P" / "301_AUDIO.flac",
        audio / "302_AUDIO.wav",
    ]


def test_e_daic_has_only_the_participant(tmp_path: Path) -> None:
    (tmp_path / "300_P").mkdir()
    text = "Start_Time,End_Time,Text,Confidence\n1.5,3.0,hello <laughter> there,0.9\n"
    (tmp_path / "300_P" / "300_Transcript.csv").write_text(text, encoding="utf-8")
    [conversation] = read_daic(tmp_path, None, CorpusConfig()).conversations
    assert [(conversation.id, turn.speaker, turn.text, turn.span) for turn in conversation.turns] == [
        ("300", "client", "hello there", (1.5, 3.0))
    ]


def test_mi_tags_turns_are_ordered_by_number(tmp_path: Path) -> None:
    text = CODED + "0,T,a,OQ,ann\n10,C,c,CT,ann\n0,T,a,CQ,bob\n2,C,b,CT,bob\n10,C,c,ST,bob\n0,T,a,OQ,cy\n"
    (tmp_path / "s.csv").write_text(text, encoding="utf-8")
    corpus = read_mi_tags(tmp_path / "s.csv", None, CorpusConfig())
    (conversation,) = corpus.conversations
    assert [(turn.id, turn.index, turn.label, turn.votes) for turn in conversation.turns] == [
        ("s/0", 0, "oq", {"oq": 2, "cq": 1}),
        ("s/2", 1, "ct", {}),
        ("s/10", 2, "ct", {"ct": 1, "st": 1}),
    ]
    assert [(finding.code, finding.where) for finding in corpus.findings] == [("W_LABEL_TIE", "s.csv:3")]
    assert (corpus.roles, corpus.declared) == ({"client": ("ct",), "therapist": ("oq",)}, False)


@pytest.mark.parametrize("column", ["conversation", "session"])
def test_mi_tags_file_may_have_several_sessions(tmp_path: Path, column: str) -> None:
    text = f"{column},turn,speaker,text,code\np,0,counsellor,a,q\nr,0,patient,a,x\np,1,client,b,x\n"
    (tmp_path / "all.csv").write_text(text, encoding="utf-8")
    corpus = read_mi_tags(tmp_path / "all.csv", None, CorpusConfig())
    assert [[turn.id for turn in one.turns] for one in corpus.conversations] == [["p/0", "p/1"], ["r/0"]]


def test_mi_tags_turn_without_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(CODED + "one,t,a,q,ann\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"^s\.csv:2: turn 'one' is not a whole number"):
        read_mi_tags(tmp_path / "s.csv", None, CorpusConfig())


PUBLISHED = "id,Video Title,Turn,Speaker,Text,Code,Annotator,Normalized Turn\n"


@pytest.mark.parametrize("header", [PUBLISHED, PUBLISHED.lower(), PUBLISHED.upper()])
def test_mi_tags_as_published_has_a_session_per_video(header: str, tmp_path: Path) -> None:
    """Turns of different videos have equal numbers, and some have several annotators."""
    rows = "1,A,0,T,hi,Q,A1,0\n2,A,0,T,hi,R,A2,0\n3,A,1,C,ho,CT,Expert,1\n4,B,0,T,hey,Q,A1,0\n"
    (tmp_path / "s.csv").write_text(header + rows, encoding="utf-8")
    corpus = read_mi_tags(tmp_path / "s.csv", None, CorpusConfig())
    assert [(one.id, [turn.text for turn in one.turns]) for one in corpus.conversations] == [
        ("A", ["hi", "ho"]),
        ("B", ["hey"]),
    ]
    assert corpus.conversations[0].turns[0].votes == {"q": 1, "r": 1}


def test_session_without_turns_is_left_out_with_a_finding(tmp_path: Path) -> None:
    for folder, read, suffix, full, empty in (
        ("w", read_whisperx, ".json", '{"segments": [{"text": "a", "speaker": "SPEAKER_00"}]}', '{"segments": []}'),
        ("d", read_daic, "_TRANSCRIPT.csv", DAIC, DAIC.partition("\n")[0]),
        ("m", read_mi_tags, ".csv", CODED + "0,t,a,q,ann\n", CODED),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"a{suffix}").write_text(full, encoding="utf-8")
        (tmp_path / folder / f"b{suffix}").write_text(empty, encoding="utf-8")
        corpus = read(tmp_path / folder, None, ROLES)
        assert [one.id for one in corpus.conversations] == ["a"]
        found = [(one.code, one.utterance) for one in corpus.findings if one.code != "W_TS_OPEN"]
        assert found == [("W_SESSION_EMPTY", "b")]


def word(text: str, speaker: str = "", start: float | None = None) -> dict[str, object]:
    times = {} if start is None else {"start": start, "end": start + 0.4}
    return {"word": text, **times, **({"speaker": speaker} if speaker else {})}


def test_segment_of_two_speakers_is_split_at_the_word(tmp_path: Path) -> None:
    """A word without speaker or times, such as a number, belongs to the one before it."""
    words = [word("So,", "SPEAKER_00", 0.0), word("2014,"), word("then?", "SPEAKER_00", 1.0)]
    words += [word("Yes", "SPEAKER_01", 1.5), word("I", "SPEAKER_01", 2.0), word("do.", "SPEAKER_01")]
    mixed = {"start": 0.0, "end": 3.0, "text": " So, 2014, then? Yes I do.", "speaker": "SPEAKER_01", "words": words}
    alone = {"start": 4.0, "end": 5.0, "text": " Good.", "words": [word("Good.", "SPEAKER_00", 4.0)]}
    whisper(tmp_path / "a.json", {**mixed, "label": "change"}, alone)
    corpus = read_whisperx(tmp_path / "a.json", None, ROLES)
    (conversation,) = corpus.conversations
    assert [(turn.id, turn.speaker, turn.text, turn.span, turn.label) for turn in conversation.turns] == [
        ("a/0", "therapist", "So, 2014, then?", (0.0, 1.4), None),
        ("a/1", "client", "Yes I do.", (1.5, 3.0), "change"),
        ("a/2", "therapist", "Good.", (4.0, 5.0), None),
    ]
    assert [(one.code, one.where) for one in corpus.findings] == [("W_SPEAKERS_SPLIT", "a.json:segments[0]")]


def test_segments_are_sorted_by_start(tmp_path: Path) -> None:
    late, early = ({"start": start, "end": start + 1, "text": f"{start}", "speaker": "SPEAKER_00"} for start in (5, 1))
    whisper(tmp_path / "a.json", late, early)
    corpus = read_whisperx(tmp_path / "a.json", None, ROLES)
    assert [(turn.id, turn.start) for turn in corpus.conversations[0].turns] == [("a/0", 1), ("a/1", 5)]
    assert [one.code for one in corpus.findings] == ["W_TS_SORTED"]


def test_annotations_are_no_words(tmp_path: Path) -> None:
    """A turn with nothing else has no audio; the settings may keep them in the text."""
    rows = "start_time\tstop_time\tspeaker\tvalue\n0\t1\tEllie\t<sync>\n1\t2\tParticipant\t<laughter> i see [noise]\n"
    (tmp_path / "300_TRANSCRIPT.csv").write_text(rows + "2\t3\tEllie\ti_intro (hi there)\n", encoding="utf-8")
    corpus = read_daic(tmp_path, None, CorpusConfig())
    (conversation,) = corpus.conversations
    assert [(turn.text, turn.end) for turn in conversation.turns] == [
        ("", None),
        ("i see", 2),
        ("i_intro (hi there)", 3),
    ]
    assert [(one.code, one.utterance) for one in corpus.findings] == [("W_NO_WORDS", "300/0")]
    kept = read_daic(tmp_path, None, CorpusConfig(annotations="keep"))
    assert [turn.text for turn in kept.conversations[0].turns][:2] == ["<sync>", "<laughter> i see [noise]"]
    assert [one.code for one in kept.findings] == ["W_NO_WORDS"]
    with pytest.raises(DataError, match="is a file, but the format reads a folder"):
        read_daic(tmp_path / "300_TRANSCRIPT.csv", None, CorpusConfig())
