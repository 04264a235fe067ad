"""A recording a speaker, as Zoom writes them: each turn is cut from the file of its speaker."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.corpus.schema import SAMPLE_RATE, Corpus
from data.errors import DataError
from data.importers import IMPORTERS
from data.preparation.validate import check, cut

HEADER = "conversation,speaker,text,label,start,end,file\n"
COLUMNS = {"label": "label", "start": "start", "end": "end"}


def source(folder: Path, sessions: int = 2, speakers: tuple[str, str] = ("T", "C"), files: str = "") -> Path:
    rows = [
        f"s{session},{speakers[index % 2]},word {index},{'ab'[index % 2]},{index},{index + 0.8},"
        + files.format(session=session, speaker=speakers[index % 2])
        for session in range(1, sessions + 1)
        for index in range(4)
    ]
    (folder / "t.csv").write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")
    return folder / "t.csv"


def record(path: Path, level: float, seconds: float = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * SAMPLE_RATE), level), SAMPLE_RATE)


def read(source: Path, audio: Path, **settings: object) -> Corpus:
    columns = COLUMNS | settings.pop("columns", {})  # type: ignore[operator]
    return IMPORTERS["table"].read(source, audio, CorpusConfig.model_validate({**settings, "columns": columns}))


def levels(corpus: Corpus) -> list[float | None]:
    """Cut all turns; return the level of each in tenths of full scale, which says from which file it is."""
    check(corpus)
    findings: list[Finding] = []
    for conversation in corpus.conversations:
        cut(conversation, {}, findings)
    turns = [turn for conversation in corpus.conversations for turn in conversation.turns]
    return [None if turn.audio is None else round(float(turn.audio.mean()) / 3276.7) for turn in turns]


@pytest.mark.parametrize(
    ("names", "speakers"),
    [
        (("s{}_therapist.wav", "s{}_client.wav"), ("T", "C")),  # by role
        (("s{}-T.flac", "s{}-C.flac"), ("T", "C")),  # as the source writes the speaker
        (("therapist_S{}.wav", "client_S{}.wav"), ("Therapist", "Client")),
        (("s{}/therapist.wav", "s{}/client.wav"), ("T", "C")),
        (("s{}/Audio Record/audioDrLee11234567.wav", "s{}/Audio Record/audioSam21234567.wav"), ("Dr Lee", "Sam")),
    ],
)
def test_files_of_speakers_are_found_by_name(names: tuple[str, str], speakers: tuple[str, str], tmp_path: Path) -> None:
    for session in (1, 2):
        for level, name in enumerate(names, start=1):
            record(tmp_path / "audio" / name.format(session), (session + 2 * level) / 10)
    record(tmp_path / "audio" / names[0].format(10), 0.9)  # of another session
    roles = {speakers[0]: "therapist", speakers[1]: "client"}
    corpus = read(source(tmp_path, speakers=speakers), tmp_path / "audio", roles=roles)
    assert levels(corpus) == [3, 5, 3, 5, 4, 6, 4, 6]
    assert {finding.code for finding in corpus.findings} == {"W_AUDIO_SPEAKERS"}
    assert all(conversation.recording is None for conversation in corpus.conversations)


def test_only_session_needs_no_name(tmp_path: Path) -> None:
    record(tmp_path / "audio/audio1234Lee.wav", 0.1)
    record(tmp_path / "audio/audio1234Sam.wav", 0.2)
    roles = {"Lee": "therapist", "Sam": "client"}
    corpus = read(source(tmp_path, 1, ("Lee", "Sam")), tmp_path / "audio", roles=roles)
    assert levels(corpus) == [1, 2, 1, 2]


def test_column_may_name_the_file_of_a_speaker(tmp_path: Path) -> None:
    for session in (1, 2):
        record(tmp_path / f"audio/{session}T.wav", session / 10)
        record(tmp_path / f"audio/{session}C.wav", session / 5)
    table = source(tmp_path, files="{session}{speaker}.wav")
    corpus = read(table, tmp_path / "audio", columns={"recording": "file"})
    assert levels(corpus) == [1, 2, 1, 2, 2, 4, 2, 4]
    with pytest.raises(DataError, match=r"file is '1C.wav', but '1T.wav' at t.csv:2; a session has only one"):
        read(table, tmp_path / "audio", columns={"recording": "file"}, recordings="session")
    table.write_text(table.read_text().replace("2,2.8,1T.wav", "2,2.8,x.wav"))
    with pytest.raises(DataError, match=r"file is 'x.wav', but '1T.wav' at t.csv:2"):
        read(table, tmp_path / "audio", columns={"recording": "file"})


def test_speaker_without_a_file_is_a_finding(tmp_path: Path) -> None:
    record(tmp_path / "audio/s1_therapist.wav", 0.1)
    record(tmp_path / "audio/s1_therapist_notes.wav", 0.9)
    corpus = read(source(tmp_path, 1), tmp_path / "audio")
    assert levels(corpus) == [1, None, 1, None]
    missing = [finding for finding in corpus.findings if finding.code == "E_AUDIO_MISSING"]
    assert [finding.message for finding in missing] == ["the file s1_C.wav does not exist in audio"] * 2


def test_recording_of_the_session_comes_first(tmp_path: Path) -> None:
    for name, level in (("s1", 0.1), ("s1_T", 0.2), ("s1_C", 0.3)):
        record(tmp_path / f"audio/{name}.wav", level)
    table = source(tmp_path, 1)
    assert levels(read(table, tmp_path / "audio")) == [1, 1, 1, 1]
    assert levels(read(table, tmp_path / "audio", recordings="speaker")) == [2, 3, 2, 3]


def test_two_files_of_one_speaker_are_refused(tmp_path: Path) -> None:
    record(tmp_path / "audio/s1_client.wav", 0.1)
    record(tmp_path / "audio/s1/client.wav", 0.1)
    record(tmp_path / "audio/s1_patient.wav", 0.1)
    with pytest.raises(DataError, match=r"s1: client.wav, s1_client.wav and s1_patient.wav are all|are all recordings"):
        read(source(tmp_path, 1), tmp_path / "audio")


def test_turn_of_a_speaker_ends_with_its_recording(tmp_path: Path) -> None:
    record(tmp_path / "audio/s1_T.wav", 0.1, seconds=2.9)
    record(tmp_path / "audio/s1_C.wav", 0.2, seconds=2.0)
    corpus = read(source(tmp_path, 1), tmp_path / "audio")
    assert levels(corpus) == [1, 2, 1, None]
    first, second = corpus.conversations[0].turns[0], corpus.conversations[0].turns[3]
    assert first.recording != second.recording
