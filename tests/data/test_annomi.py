"""AnnoMI-simple: times, labels and recordings, on files made here and, when it is at hand, on the real one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.config import DataConfig
from data.errors import DataError
from data.examples import read_example
from data.importers.annomi import read_annomi
from data.prepare import prepare
from data.schema import SPLITS
from data.tasks import items
from tests.conftest import SHARED

HEADER = (
    "transcript_id,mi_quality,video_title,video_url,topic,utterance_id,interlocutor,timestamp,utterance_text,"
    "main_therapist_behaviour,client_talk_type"
)
STAMPS = ("00:00:00", "00:00:02", "00:00:02", "00:00:06", "00:00:04", "00:00:010", "00:00:12")


def row(session: int, number: int, stamp: str, label: str | None = None) -> str:
    if number % 2:
        return f'{session},high,t,video{session},x,{number},client,{stamp},"well, {number}",n/a,{label or "change"}'
    return f"{session},high,t,video{session},x,{number},therapist,{stamp},so {number}?,{label or 'question'},n/a"


def low(line: str) -> str:
    return line.replace(",high,", ",low,")


def write(folder: Path, sessions: int = 5, **changed: str) -> Path:
    lines = [row(session, number, stamp) for session in range(sessions) for number, stamp in enumerate(STAMPS)]
    for place, line in changed.items():
        lines[int(place.removeprefix("at"))] = line
    path = folder / "annomi.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return path


def record(folder: Path, sessions: int = 5, seconds: float = 13.0) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for session in range(sessions):
        rate, channels = [(16_000, 1), (44_100, 2), (22_050, 1)][session % 3]
        noise = rng.standard_normal((int(seconds * rate), channels)) * 0.1
        soundfile.write(folder / f"{session}.wav", noise, rate)
    return folder


def test_ends_are_the_next_starts_and_odd_times_are_counted(tmp_path: Path) -> None:
    corpus = read_annomi(write(tmp_path, sessions=1))
    (conversation,) = corpus.conversations
    assert [turn.end for turn in conversation.turns] == [2.0, None, 6.0, None, 10.0, 12.0, None]
    assert conversation.turns[5].start == 10.0  # written 00:00:010
    codes = [(finding.code, finding.utterance) for finding in corpus.findings]
    assert sorted(codes) == [
        ("W_TS_FORMAT", "0/5"),
        ("W_TS_OPEN", "0/6"),
        ("W_TS_ORDER", "0/3"),
        ("W_TS_ZERO", "0/1"),
    ]
    assert all(finding.where.startswith("annomi.csv:") for finding in corpus.findings)


def test_the_quality_of_a_session_comes_with_every_turn(tmp_path: Path) -> None:
    changed = {f"at{place}": low(row(1, place - 7, STAMPS[place - 7])) for place in range(7, 14)}
    shards = prepare(read_annomi(write(tmp_path, **changed)), tmp_path / "shards")
    assert shards.manifest.qualities == ("high", "low")
    pairs = set(zip(shards.columns["conversation"], shards.columns["quality"], strict=True))
    assert pairs == {("0", "high"), ("1", "low"), ("2", "high"), ("3", "high"), ("4", "high")}
    own = [
        read_example(shards, item, DataConfig(), False) for split in SPLITS for item in items(shards, "quality", split)
    ]
    assert {example.id: example.answer for example in own} == dict(pairs)


def test_unreadable_times_cost_the_sound_of_two_turns_and_no_text(tmp_path: Path) -> None:
    corpus = read_annomi(write(tmp_path, sessions=1, at3=row(0, 3, "soon")))
    (conversation,) = corpus.conversations
    assert len(conversation.turns) == len(STAMPS)
    assert [turn.end for turn in conversation.turns[2:4]] == [None, None]
    assert {"E_TS_FORMAT", "W_TS_OPEN"} <= {finding.code for finding in corpus.findings}


def test_clips_are_cut_resampled_and_mixed_down(tmp_path: Path) -> None:
    shards = prepare(read_annomi(write(tmp_path), record(tmp_path / "audio")), tmp_path / "shards")
    samples = dict(zip(shards.columns["id"], shards.columns["n_samples"], strict=True))
    for session in range(5):
        assert [samples[f"{session}/{number}"] for number in range(7)] == [32000, 0, 64000, 0, 96000, 32000, 0]
    assert shards.manifest.findings["W_STEREO"] == 2
    assert shards.manifest.findings["W_RESAMPLED"] == 3
    assert sum(shards.manifest.turns.values()) == 35


def test_a_clip_past_the_recording_is_kept_as_text(tmp_path: Path) -> None:
    shards = prepare(read_annomi(write(tmp_path), record(tmp_path / "audio", seconds=11.0)), tmp_path / "shards")
    assert shards.manifest.findings["E_TS_RANGE"] == 5
    assert sum(shards.manifest.turns.values()) == 35


def test_without_audio_the_corpus_is_text_only(tmp_path: Path) -> None:
    shards = prepare(read_annomi(write(tmp_path)), tmp_path / "shards")
    assert sum(shards.manifest.hours.values()) == 0
    assert set(shards.columns["n_samples"]) == {0}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (row(0, 1, "00:00:02", "chnge"), "did you mean 'change'"),
        (row(0, 1, "00:00:02", "question"), "unknown client label 'question'"),
        (row(0, 0, "00:00:02"), "stands already at"),
        (row(0, 1, "00:00:02").replace(",client,", ",clinet,"), "interlocutor 'clinet'"),
        (row(0, 1, "00:00:02").replace(",high,", ",hihg,"), "mi_quality 'hihg' is unknown; known: high, low"),
        (low(row(0, 1, "00:00:02")), "mi_quality 'low', and transcript 0 began with 'high'"),
        ("0,high,t", "fewer cells"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(DataError, match=r"^annomi\.csv:3: ") as error:
        read_annomi(write(tmp_path, at1=line))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("transcript_id,utterance_id\n0,0\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.csv:1: missing column\(s\) mi_quality, video_url, interlocutor"):
        read_annomi(path)


def test_an_open_quote_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace('"well, 1"', '"well, 1', 1) + "x" * 200_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"annomi\.csv:\d+: "):
        read_annomi(path)


def test_bytes_that_are_not_utf8_are_named_with_line_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes().split(b"\n")
    content[4] = content[4].replace(b"well", b"w\xe9ll")
    path.write_bytes(b"\n".join(content))
    with pytest.raises(DataError, match=r"annomi\.csv:5: byte \d+ is not UTF-8"):
        read_annomi(path)


def test_folders_without_recordings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of 5 transcripts has a recording"):
        read_annomi(write(tmp_path), tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        read_annomi(write(tmp_path), tmp_path / "nowhere")


def test_a_missing_recording_is_counted_and_its_turns_stay_as_text(tmp_path: Path) -> None:
    audio = record(tmp_path / "audio")
    (audio / "2.wav").unlink()
    corpus = read_annomi(write(tmp_path), audio)
    assert [finding.utterance for finding in corpus.findings if finding.code == "E_AUDIO_MISSING"] == ["2"]


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="needs AnnoMI-simple.csv, which the project may not ship")
def test_the_real_corpus_has_its_known_counts(tmp_path: Path) -> None:
    corpus = read_annomi(SHARED / "AnnoMI-simple.csv")
    conversations = list(corpus.conversations)
    turns = [turn for conversation in conversations for turn in conversation.turns]
    assert len(turns) == 9_699
    assert len(conversations) == 133
    assert len({conversation.group for conversation in conversations}) == 119
    assert sum(turn.end is not None for turn in turns) == 8_300
    assert Counter(conversation.quality for conversation in conversations) == {"high": 110, "low": 23}
    found = prepare(corpus, tmp_path / "shards").manifest.findings
    assert found == {"W_TS_FORMAT": 1, "W_TS_OPEN": 133, "W_TS_ORDER": 10, "W_TS_ZERO": 1256}
