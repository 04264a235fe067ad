"""Inputs that people have and that once failed, where they are at hand; each is read as its README says."""

from collections import Counter
from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers import IMPORTERS, guess_format
from data.preparation.validate import check, cut, read_clip
from tests.conftest import SHARED

CASES = SHARED.parent / "cases"
TIMED = {"label": "label", "start": "start", "end": "end"}
LABELS = {"question", "reflection", "change", "sustain", "neutral"}
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"needs {CASES}")


def folder(number: str) -> Path:
    return next(CASES.glob(f"{number}-*"))


def read(kind: str, source: Path, audio: Path | None = None, **settings: object) -> Corpus:
    columns = settings.pop("columns", TIMED)
    return IMPORTERS[kind].read(source, audio, CorpusConfig.model_validate({**settings, "columns": columns}))


def checked(corpus: Corpus) -> Counter[str]:
    """Return the codes of all findings after the checks of table and audio, without those about rate and channels."""
    findings: list[Finding] = []
    check(corpus)
    for conversation in corpus.conversations:
        cut(conversation, {}, findings)
        for turn in conversation.turns:
            read_clip(turn, findings)
    codes = Counter(finding.code for finding in (*corpus.findings, *findings))
    return Counter({code: count for code, count in codes.items() if code not in ("W_RESAMPLED", "W_STEREO")})


@pytest.mark.parametrize("name", ["utterances.csv", "lower.csv", "folder"])
def test_mi_tags_as_published(name: str) -> None:
    corpus = read("mi-tags", folder("01") / name)
    assert {conversation.id for conversation in corpus.conversations} == {f"Role-Play {letter}" for letter in "ABC"}
    assert set(checked(corpus)) <= {"W_DUPLICATE", "W_LABEL_TIE"}
    assert [len(conversation.turns) for conversation in corpus.conversations] == [8] * 3


@pytest.mark.parametrize(
    ("number", "part", "codes"),
    [
        ("02", "zero", {"W_LENGTH": 1}),
        ("02", "stale", {"W_LENGTH": 1}),
        ("03", ".", {}),
        ("07", "aif", {}),
        ("07", "caf", {}),
        ("07", "sph", {}),
    ],
)
def test_recordings_of_twelve_seconds(number: str, part: str, codes: dict[str, int]) -> None:
    corpus = read("table", folder(number) / "t.csv", folder(number) / part)
    assert checked(corpus) == codes
    assert all(turn.audio is not None for one in corpus.conversations for turn in one.turns)


@pytest.mark.parametrize("part", ["aac", "amr", "m4a", "mp4", "webm"])
def test_recordings_of_phones_and_meetings(part: str) -> None:
    """They have 6 s, and the table has turns until 12 s."""
    corpus = read("table", folder("06") / "t.csv", folder("06") / part)
    assert checked(corpus) == {"E_TS_RANGE": 12}


@pytest.mark.parametrize("name", ["comma.csv", "de.csv", "mac.csv", "sep.csv", "u16.txt", "day.csv"])
def test_tables_saved_by_excel(name: str) -> None:
    columns = {**TIMED, "label": "Code (Q, R)" if name == "comma.csv" else "label"}
    unit = "d" if name == "day.csv" else "s"
    corpus = read("table", folder("10") / name, folder("10") / "audio", columns=columns, time_unit=unit)
    assert checked(corpus) == {}
    assert set(corpus.labels) == LABELS


def test_daic_with_annotations() -> None:
    codes = checked(read("daic", folder("11") / "woz"))
    assert set(codes) <= {"W_NO_WORDS", "W_TS_OPEN", "W_AUDIO_GAP"}
    assert codes["W_NO_WORDS"] == 4  # three <sync>, and an empty turn


@pytest.mark.parametrize(
    ("part", "expected"), [("x", {"E_SPEAKER"}), ("y", {"W_TS_CLAMPED"}), ("z", {"W_SPEAKERS_SPLIT"})]
)
def test_whisperx_as_it_comes(part: str, expected: set[str]) -> None:
    roles = {"SPEAKER_00": "therapist", "SPEAKER_01": "client"}
    corpus = read("whisperx", folder("12") / part, folder("12") / "audio", roles=roles)
    assert expected <= set(checked(corpus)) <= expected | {"W_TS_OVERLAP", "W_TS_CLAMPED", "W_SPEAKERS_SPLIT"}


@pytest.mark.parametrize("part", ["edaic", "renamed"])
def test_e_daic_has_only_participants(part: str) -> None:
    corpus = read(guess_format(folder("11") / part), folder("11") / part)
    assert {turn.speaker for one in corpus.conversations for turn in one.turns} == {"client"}
    assert sum(len(one.turns) for one in corpus.conversations) == 12


FIRST = ("speaker_0", "SPEAKER_00", "A", "1", "spk_0", "Person A")
SECOND = ("speaker_1", "SPEAKER_01", "B", "2", "spk_1", "Person B")
ROLES = dict.fromkeys(FIRST, "therapist") | dict.fromkeys(SECOND, "client")


@pytest.mark.parametrize(
    ("part", "turns"),
    [("assemblyai", 24), ("deepgram", 24), ("nemo_manifest", 24), ("openai_diarize", 24), ("deep", 24)],
)
def test_json_of_recognisers(part: str, turns: int) -> None:
    source = folder("13") / part
    corpus = read(guess_format(source), source, roles=ROLES)
    assert sum(len(one.turns) for one in corpus.conversations) == turns
    assert checked(corpus) == {}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("openai_whisper", "without speakers"),
        ("whispercpp", "without speakers"),
        ("aws", "AWS Transcribe without words"),
    ],
)
def test_json_without_what_is_needed_is_refused(part: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(guess_format(folder("13") / part), folder("13") / part)


@pytest.mark.parametrize(
    ("name", "kind", "sessions", "turns"),
    [
        ("s1.vtt", "subtitles", 1, 2),
        ("s1.srt", "subtitles", 1, 2),
        ("s1.eaf", "elan", 1, 1),
        ("elan_export.txt", "elan", 3, 24),
        ("s1.TextGrid", "praat", 1, 1),
        ("s1.cha", "chat", 1, 2),
        ("s1.txt", "dialogue", 1, 2),
        ("hlqc.txt", "dialogue", 1, 3),
    ],
)
def test_transcripts_and_tiers(name: str, kind: str, sessions: int, turns: int) -> None:
    source = folder("17") / name
    assert guess_format(source) == kind
    corpus = read(kind, source, roles=ROLES)
    assert (len(corpus.conversations), sum(len(one.turns) for one in corpus.conversations)) == (sessions, turns)
    assert set(checked(corpus)) <= {"W_TS_OPEN"}


def test_a_table_for_each_session() -> None:
    columns = {"conversation": None, "speaker": "Type", "text": "Utterance", "label": "Dialogue_Act"}
    corpus = read("table", folder("17") / "hope", columns=columns)
    assert [one.id for one in corpus.conversations] == ["Copy of 1", "Copy of 2", "Copy of 3"]
    assert checked(corpus) == {}


@pytest.mark.parametrize("name", ["doccano_cls.jsonl", "doccano_seq.jsonl", "ls.csv", "ls.json"])
def test_exports_of_annotation_tools(name: str) -> None:
    columns = {"conversation": "session", "speaker": "who", "label": "label"}
    corpus = read("table", folder("14") / name, columns=columns)
    assert set(corpus.labels) <= LABELS | {"other"}
    assert set(checked(corpus)) == set()


def test_what_pandas_leaves_behind() -> None:
    corpus = read("table", folder("16") / "nan.csv")
    codes = checked(corpus)
    assert set(corpus.labels) == LABELS
    assert {"W_LABEL_MISSING", "W_TEXT_MISSING", "W_TEXT_EMPTY"} <= set(codes)


def test_tiers_one_after_the_other() -> None:
    columns = {"conversation": "File", "speaker": "Tier", "text": "Annotation", "label": "Code"}
    columns |= {"start": "Begin Time - ss.msec", "end": "End Time - ss.msec"}
    corpus = read("table", folder("18") / "elan.csv", columns=columns)
    assert set(checked(corpus)) == {"W_TS_SORTED"}
    assert [turn.speaker for turn in corpus.conversations[0].turns] == ["therapist", "client"] * 4


@pytest.mark.parametrize("name", ["zw.csv", "zw2.csv", "case.csv", "scripts.csv"])
def test_invisible_characters(name: str) -> None:
    corpus = read("table", folder("19") / name)
    assert set(corpus.labels) == LABELS
    assert {turn.speaker for one in corpus.conversations for turn in one.turns} == {"therapist", "client"}
    assert set(checked(corpus)) <= {"W_LABEL_UNICODE"}


@pytest.mark.parametrize("columns", [TIMED, {**TIMED, "recording": "file"}])
def test_recording_per_speaker(columns: dict[str, str]) -> None:
    corpus = read("table", folder("21") / "t.csv", folder("21") / "audio", columns=columns)
    files = {turn.recording and turn.recording.name for one in corpus.conversations for turn in one.turns}
    assert files == {f"s{session}_{role}.wav" for session in (1, 2, 3) for role in ("therapist", "client")}
    assert set(checked(corpus)) <= {"W_AUDIO_SPEAKERS", "E_TS_RANGE", "W_TS_CLAMPED"}
