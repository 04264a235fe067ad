"""AnnoMI: times, labels, qualities and annotators, in files made here and in the real ones if they are present."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.corpus.config import CorpusConfig
from data.corpus.issues import BuildError
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers.tables.annomi import read_annomi
from data.preparation.build import prepare
from data.preparation.validate import check
from tests.conftest import SHARED

HEADER = (
    "transcript_id,mi_quality,video_title,video_url,topic,utterance_id,interlocutor,timestamp,utterance_text,"
    "main_therapist_behaviour,client_talk_type"
)
STAMPS = ("00:00:00", "00:00:02", "00:00:02", "00:00:06", "00:00:04", "00:00:010", "00:00:12")


def row(session: int, number: int, stamp: str, label: str | None = None) -> str:
    if number % 2:
        codes = f"n/a,{'change' if label is None else label}"
        return f'{session},high,t,video{session},x,{number},client,{stamp},"well, {number}",{codes}'
    codes = f"{'question' if label is None else label},n/a"
    return f"{session},high,t,video{session},x,{number},therapist,{stamp},so {number}?,{codes}"


def low(line: str) -> str:
    return line.replace(",high,", ",low,")


def write(folder: Path, sessions: int = 5, **changed: str) -> Path:
    lines = [row(session, number, stamp) for session in range(sessions) for number, stamp in enumerate(STAMPS)]
    for place, line in changed.items():
        lines[int(place.removeprefix("at"))] = line
    path = folder / "annomi.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return path


def write_full(folder: Path, *codes: str) -> Path:
    """One client utterance with a code by each annotator, and one after it with a single one."""
    header = HEADER.replace("utterance_text,", "utterance_text,annotator_id,")
    rows = [f"0,high,t,v,x,0,client,00:00:01,text by {who},{who},n/a,{code}" for who, code in enumerate(codes)]
    path = folder / "annomi.csv"
    path.write_text("\n".join([header, *rows, "0,high,t,v,x,1,client,00:00:03,end,4,n/a,neutral"]), encoding="utf-8")
    return path


def read(path: Path, audio: Path | None = None) -> Corpus:
    return read_annomi(path, audio, CorpusConfig())


def found(corpus: Corpus) -> list[tuple[str, str]]:
    return sorted((finding.code, finding.utterance) for finding in corpus.findings)


def test_ends_are_the_next_starts(tmp_path: Path) -> None:
    corpus = read(write(tmp_path, sessions=1))
    (conversation,) = corpus.conversations
    assert [turn.end for turn in conversation.turns] == [2.0, None, 6.0, None, 10.0, 12.0, None]
    assert conversation.turns[5].start == 10.0  # written 00:00:010
    known = [("W_TS_FORMAT", "0/5"), ("W_TS_OPEN", "0/3"), ("W_TS_OPEN", "0/6"), ("W_TS_ZERO", "0/1")]
    assert found(corpus) == known
    check(corpus)
    assert ("W_TS_ORDER", "0/4") in found(corpus)
    assert all(finding.where.startswith("annomi.csv:") for finding in corpus.findings)


def test_unreadable_time_rejects_the_turn_and_opens_the_previous(tmp_path: Path) -> None:
    corpus = read(write(tmp_path, sessions=1, at3=row(0, 3, "soon")))
    (conversation,) = corpus.conversations
    assert len(conversation.turns) == len(STAMPS)
    assert [turn.end for turn in conversation.turns[2:4]] == [None, None]
    assert {("E_TS_FORMAT", "0/3"), ("W_TS_OPEN", "0/2")} <= set(found(corpus))
    assert [turn.label for turn in conversation.turns[2:4]] == ["question", None]


def test_sessions_have_group_and_quality(tmp_path: Path) -> None:
    changed = {f"at{place}": low(row(1, place - 7, STAMPS[place - 7])) for place in range(7, 14)}
    corpus = read(write(tmp_path, sessions=2, **changed))
    assert [(one.id, one.group, one.quality) for one in corpus.conversations] == [
        ("0", "video0", "high"),
        ("1", "video1", "low"),
    ]
    assert corpus.qualities == ("high", "low")
    assert corpus.labels == ("change", "neutral", "sustain", "other", "question", "reflection", "therapist_input")


@pytest.mark.parametrize(("code", "message"), [("chnge", "did you mean 'change'"), ("", "label '' is unknown")])
def test_unknown_or_missing_label_is_found_by_validation(tmp_path: Path, code: str, message: str) -> None:
    corpus = read(write(tmp_path, sessions=1, at1=row(0, 1, "00:00:02", code)))
    check(corpus)
    (finding,) = (finding for finding in corpus.findings if finding.code == "E_LABEL")
    assert (finding.where, finding.utterance) == ("annomi.csv:3", "0/1")
    assert message in finding.message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row(0, 1, "00:00:02").replace(",high,", ",hihg,"), "mi_quality 'hihg' is unknown; use one of high, low"),
        (low(row(0, 1, "00:00:02")), "mi_quality is 'low', but 'high' at annomi.csv:2; a session has only one"),
        (row(0, 1, "00:00:02").replace(",x,1,", ",x,one,"), "utterance_id 'one' is not a whole number"),
        (row(0, 1, "00:00:02")[1:], "transcript_id is empty"),
        ("0,high,t", "fewer cells"),
        (row(0, 1, "00:00:02").replace('"', ""), "more cells"),
    ],
)
def test_invalid_row_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=r"^annomi\.csv:3: ") as error:
        read(write(tmp_path, at1=line))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_id_of_two_utterances_fails(tmp_path: Path) -> None:
    corpus = read(write(tmp_path, at1=row(0, 0, "00:00:02", "other")))
    with pytest.raises(BuildError, match=r"F_DUPLICATE annomi\.csv:3, 0/0: is already at annomi\.csv:2"):
        check(corpus)


def test_full_version_uses_the_majority_vote(tmp_path: Path) -> None:
    corpus = read(write_full(tmp_path, "neutral", "change", "change", "neutral", "change", "sustain"))
    first, last = corpus.conversations[0].turns
    assert (first.label, first.votes) == ("change", {"change": 3, "neutral": 2, "sustain": 1})
    assert (first.text, first.where, first.span) == ("text by 0", "annomi.csv:2", (1.0, 3.0))
    assert (last.label, last.votes) == ("neutral", {})
    assert found(corpus) == [("W_TS_OPEN", "0/1")]
    tied = read(write_full(tmp_path, "sustain", "neutral", "sustain", "neutral", "change"))
    first = tied.conversations[0].turns[0]
    assert (first.label, first.flags) == ("neutral", ("W_LABEL_TIE",))
    assert "5 annotators gave neutral, sustain 2 x each" in {finding.message for finding in tied.findings}


def test_clips_are_cut_between_starts(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    for session, (rate, channels) in enumerate([(16_000, 1), (22_050, 2), (8_000, 1)]):
        noise = np.random.default_rng(session).standard_normal((13 * rate, channels)) * 0.1
        soundfile.write(audio / f"{session}.wav", noise, rate)
    shards = prepare(read(write(tmp_path, sessions=3), audio), tmp_path / "shards")
    samples = dict(zip(shards.columns["id"], shards.columns["n_samples"], strict=True))
    for session in range(3):
        assert [samples[f"{session}/{number}"] for number in range(7)] == [32000, 0, 64000, 0, 96000, 32000, 0]


@pytest.mark.real
@pytest.mark.parametrize(("name", "ties"), [("AnnoMI-simple.csv", 0), ("AnnoMI-full.csv", 14)])
def test_real_corpus_has_the_known_counts(name: str, ties: int) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"needs {name}, which the project may not ship")
    corpus = read(SHARED / name)
    turns = [turn for conversation in corpus.conversations for turn in conversation.turns]
    assert len(turns) == 9_699
    assert len(corpus.conversations) == 133
    assert len({conversation.group for conversation in corpus.conversations}) == 119
    assert sum(turn.span is not None for turn in turns) == 8_300
    assert Counter(conversation.quality for conversation in corpus.conversations) == {"high": 110, "low": 23}
    assert {sum(turn.votes.values()) for turn in turns if turn.votes} <= {10}
    check(corpus)
    counts = Counter(finding.code for finding in corpus.findings)
    known = {"W_TS_FORMAT": 1, "W_TS_OPEN": 143, "W_TS_ORDER": 10, "W_TS_ZERO": 1256, "W_LABEL_TIE": ties}
    assert {code: counts[code] for code in known} == known
    assert not [code for code in counts if code.startswith("E_")]
