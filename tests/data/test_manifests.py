"""Kaldi directories and lhotse manifests: files of other machines are found below --audio, and nothing is executed."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers import IMPORTERS, guess_format

FILES = {
    "wav.scp": "s1 /export/corpora/train/s1.flac\ns2 s2.wav\n",
    "segments": "a s1 2.0 3.0\nb s1 0.5 2\nc s2 0 -1\n",
    "utt2spk": "a s1-client\nb s1-therapist\nc client\n",
    "text": "a i am late <noise>\nb why\nc\tgood\n",
    "utt2code": "a change\nb question\nc change\n",
}


def kaldi(folder: Path, audio: Path | None = None, **changed: str | None) -> Corpus:
    """Write a directory with other files ("segments", "wav_scp"), or without some, and read it."""
    folder.mkdir(exist_ok=True)
    names = {name.replace("wav_scp", "wav.scp"): content for name, content in changed.items()}
    for name, content in {**FILES, **names}.items():
        if content is not None:
            (folder / name).write_text(content)
    config = CorpusConfig.model_validate({"columns": {"label": "utt2code"}})
    return IMPORTERS["kaldi"].read(folder, audio, config)


@pytest.fixture(autouse=True)
def _no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a command was run"))


def recordings(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_kaldi_recording_is_a_session(tmp_path: Path) -> None:
    audio = recordings(tmp_path / "audio", "train/s1.flac", "s2.wav")
    corpus = kaldi(tmp_path / "data", audio)
    assert guess_format(tmp_path / "data") == "kaldi"
    first, second = corpus.conversations
    said = [(turn.speaker, turn.text, turn.label, turn.span) for turn in first.turns]
    assert said == [("therapist", "why", "question", (0.5, 2.0)), ("client", "i am late", "change", (2.0, 3.0))]
    assert (first.recording, second.recording) == (audio / "train/s1.flac", audio / "s2.wav")
    assert second.turns[0].end is None


def test_kaldi_recording_without_segments_is_a_turn(tmp_path: Path) -> None:
    scripts = "".join(f"{name} /x/{name}.wav\n" for name in "abc")
    corpus = kaldi(tmp_path / "data", recordings(tmp_path / "audio", "a.wav", "c.wav"), segments=None, wav_scp=scripts)
    assert {turn.id: turn.clip and turn.clip.name for one in corpus.conversations for turn in one.turns} == {
        "a/0": None,  # s1-client has no role, since the recording is not s1
        "b/0": None,
        "c/0": "c.wav",
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"wav_scp": "s1 sph2pipe -f wav x.sph |\ns2 s2.wav\n"}, r"^wav.scp:1: 'sph2pipe' is a command, which is not"),
        ({"wav_scp": "s1 x.ark:17\n"}, r"^wav.scp:1: Kaldi archives are not read"),
        ({"segments": None}, r"^text:1: 'a' is no recording of wav.scp, and there is no file segments; write it"),
        ({"segments": "a s1 0 1\n"}, r"^text:2: 'b' is not in segments"),
        ({"segments": "a s1\nb s1 0 1\nc s1 0 1\n"}, r"^segments:1: not <utterance> <recording> <start> <end>"),
        ({"utt2spk": "a x\n"}, r"^text:2: 'b' is not in utt2spk"),
        ({"utt2spk": None}, r"no file utt2spk"),
        ({"text": "a x\na y\n"}, r"^text:2: 'a' is already at text:1"),
    ],
)
def test_kaldi_directory_that_cannot_be_read(changed: dict[str, str | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        kaldi(tmp_path / "data", recordings(tmp_path / "audio", "s1.wav"), **changed)
    assert "\n" not in str(error.value)


def test_path_of_a_manifest_stays_in_the_audio_folder(tmp_path: Path) -> None:
    recordings(tmp_path, "secret.wav", "audio/s2.wav")
    corpus = kaldi(tmp_path / "data", tmp_path / "audio", wav_scp=f"s1 ../secret.wav\ns2 {tmp_path}/secret.wav\n")
    assert [one.recording for one in corpus.conversations] == [tmp_path / "audio/s1.wav", tmp_path / "audio/s2.wav"]


def supervision(number: int, start: float, text: str, **more: object) -> dict[str, object]:
    speaker = ("client", "therapist")[number % 2]
    line = {"id": f"u{number}", "recording_id": "s1", "start": start, "duration": 1.5, "channel": 0, "text": text}
    return {**line, "speaker": speaker, "custom": {"code": "ab"[number % 2]}, **more}


def recording(name: str, kind: str = "file", source: str = "/export/x/s1.flac") -> dict[str, object]:
    return {"id": name, "sources": [{"type": kind, "channels": [0], "source": source}], "sampling_rate": 16000}


def lines(path: Path, *rows: dict[str, object]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content)
    return path


CONFIG = CorpusConfig.model_validate({"columns": {"label": "code"}})


@pytest.mark.parametrize("kind", ["supervisions", "cuts"])
def test_lhotse_manifests_become_turns(kind: str, tmp_path: Path) -> None:
    said = [supervision(1, 4.0, "b"), supervision(0, 0.5, "a <sil>")]
    folder, audio = tmp_path / "manifests", recordings(tmp_path / "audio", "x/s1.flac")
    if kind == "supervisions":
        lines(folder / "x_supervisions_train.jsonl.gz", *said)
        lines(folder / "x_recordings_train.jsonl.gz", recording("s1"))
    else:  # windows of 3 s that overlap; times of supervisions are relative to them
        cut = {"type": "MonoCut", "channel": 0, "recording": recording("s1"), "duration": 3.0}
        rows = [
            {**cut, "id": f"c{number}", "start": start, "supervisions": [{**one, "start": one["start"] - start}]}
            for number, (start, one) in enumerate([(0.0, said[1]), (0.25, said[1]), (3.5, said[0])])
        ]
        lines(folder / "cuts.jsonl.gz", *rows)
    assert guess_format(folder) == "lhotse"
    corpus = IMPORTERS["lhotse"].read(folder, audio, CONFIG)
    [session] = corpus.conversations
    said_turns = [(turn.speaker, turn.text, turn.label, turn.span) for turn in session.turns]
    assert said_turns == [("client", "a", "a", (0.5, 2.0)), ("therapist", "b", "b", (4.0, 5.5))]
    assert session.recording == audio / "x/s1.flac"


def test_lhotse_sources_that_are_no_files_are_refused(tmp_path: Path) -> None:
    folder = lines(tmp_path / "m/supervisions.jsonl", supervision(0, 0.0, "a")).parent
    audio = recordings(tmp_path / "audio", "s1.wav")
    for kind in ("command", "url", "memory"):
        lines(folder / "recordings.jsonl", recording("s1", kind, "touch pwned"))
        with pytest.raises(DataError, match=rf"^recordings.jsonl:1: the audio is a '{kind}', not a file; commands are"):
            IMPORTERS["lhotse"].read(folder, audio, CONFIG)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"type": "MixedCut", "tracks": []}, r":1: is a MixedCut"),
        ({"id": "x", "text": "a"}, r":1: not a supervision with recording_id"),
        ({**supervision(0, 0.0, "a"), "start": "x"}, r":1: start or duration is 'x', not seconds"),
    ],
)
def test_lhotse_line_that_cannot_be_read(row: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        IMPORTERS["lhotse"].read(lines(tmp_path / "cuts.jsonl", row), None, CONFIG)
    (tmp_path / "cuts.jsonl.gz").write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(DataError, match="not readable as gzip"):
        IMPORTERS["lhotse"].read(tmp_path / "cuts.jsonl.gz", None, CONFIG)
