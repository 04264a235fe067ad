"""Recordings: any rate, layout and length gives the same samples in blocks or at once; clips are cut exactly."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional

from data.corpus import audio
from data.corpus.audio import SAMPLE_RATE, decode, encode, read_recording
from data.corpus.issues import Finding
from data.corpus.schema import Conversation, Turn
from data.errors import DataError
from data.preparation.validate import cut, read_clip


def noise(seconds: float, rate: int, channels: int) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((round(seconds * rate), channels)) * 0.1).astype(np.float32)


def tone(seconds: float, hertz: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    wave: np.ndarray = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return wave.astype(np.float32)


def pitch(pcm: np.ndarray) -> float:
    """The strongest frequency, in Hz."""
    return float(np.abs(np.fft.rfft(pcm)).argmax() * SAMPLE_RATE / len(pcm))


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("seconds", [0.3, 2.99, 5.01, 9.7])
def test_blocks_give_the_same_samples_as_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, seconds: float
) -> None:
    monkeypatch.setattr(audio, "_BLOCK", 3)
    signal = noise(seconds, rate, 2)
    soundfile.write(tmp_path / "x.wav", signal, rate, subtype="FLOAT")
    found = read_recording(tmp_path / "x.wav", separate=True)
    whole = torchaudio.functional.resample(torch.from_numpy(signal.T.copy()), rate, SAMPLE_RATE)
    expected = np.round(whole.clip(-1, 1).numpy() * 32767)
    assert found.pcm.shape == expected.shape
    assert abs(found.pcm - expected).max() <= 1
    assert (found.source_rate, found.source_channels) == (rate, 2)
    mixed = read_recording(tmp_path / "x.wav")
    assert abs(mixed.pcm[0] - expected.mean(axis=0)).max() <= 1


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_every_format_is_decoded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, tone(2, 440, 44_100), 44_100)
    found = read_recording(path)
    assert found.duration == pytest.approx(2, abs=0.06)
    assert pitch(found.pcm[0]) == pytest.approx(440, abs=2)


def test_channels_that_cancel_are_not_mixed(tmp_path: Path) -> None:
    wave = tone(1, 300)
    soundfile.write(tmp_path / "x.wav", np.stack([0.9 * wave, -wave], axis=1), SAMPLE_RATE, subtype="FLOAT")
    found = read_recording(tmp_path / "x.wav").pcm[0]
    assert abs(found).max() == pytest.approx(0.3 * 32767, rel=0.01)  # the louder one as it is


def test_times_of_broken_samples_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "_BLOCK", 3)
    signal = noise(8, 44_100, 1)
    signal[44_100 * 5 : 44_100 * 5 + 3] = np.inf
    soundfile.write(tmp_path / "x.wav", signal, 44_100, subtype="FLOAT")
    found = read_recording(tmp_path / "x.wav")
    assert sorted(set(found.broken.round(6))) == pytest.approx([5, 5 + 1 / 44_100, 5 + 2 / 44_100], abs=1e-5)
    assert abs(found.pcm).max() < 32767


def test_file_without_audio_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFF\x00\x00")
    with pytest.raises(DataError, match=r"x\.wav: not readable as audio .*; convert it to WAV or FLAC"):
        read_recording(tmp_path / "x.wav")


def test_codecs_are_lossless() -> None:
    pcm = np.random.default_rng(2).integers(-32768, 32768, 5000).astype(np.int16)
    for codec in ("pcm16", "flac"):
        assert np.array_equal(decode(encode(pcm, codec), codec), pcm)


def dialogue(folder: Path, signal: np.ndarray) -> Conversation:
    """Three turns of a second each, therapist first."""
    soundfile.write(folder / "s.wav", signal, SAMPLE_RATE)
    roles = ("therapist", "client", "therapist")
    turns = [Turn(f"s/{i}", i, role, "x", start=float(i), end=float(i + 1)) for i, role in enumerate(roles)]
    return Conversation("s", "s", turns, recording=folder / "s.wav")


def test_turns_are_cut_from_the_channel_of_the_role(tmp_path: Path) -> None:
    session = dialogue(tmp_path, np.stack([tone(3, 200), tone(3, 700)], axis=1))
    findings: list[Finding] = []
    cut(session, {"therapist": 0, "client": 1}, findings)
    assert [round(pitch(turn.audio)) for turn in session.turns] == [200, 700, 200]
    assert findings == []


def test_missing_channel_is_a_finding(tmp_path: Path) -> None:
    session = dialogue(tmp_path, tone(3, 200))
    findings: list[Finding] = []
    cut(session, {"therapist": 0, "client": 1}, findings)
    assert [(finding.code, finding.utterance) for finding in findings] == [("E_AUDIO_MISSING", "s/1")]
    assert "the client is expected on channel 1, but the file has 1" in findings[0].message
    assert [turn.audio is None for turn in session.turns] == [False, True, False]


def test_turn_may_have_a_separate_file(tmp_path: Path) -> None:
    session = dialogue(tmp_path, tone(3, 200))
    soundfile.write(tmp_path / "own.flac", tone(0.7, 500, 8_000), 8_000)
    soundfile.write(tmp_path / "short.wav", tone(0.05, 500), SAMPLE_RATE)
    session.turns[1].clip, session.turns[2].clip = tmp_path / "own.flac", tmp_path / "short.wav"
    findings: list[Finding] = []
    cut(session, {}, findings)
    for turn in session.turns:
        read_clip(turn, findings)
    assert round(pitch(session.turns[0].audio)) == 200
    assert len(session.turns[1].audio) == 0.7 * SAMPLE_RATE
    assert pitch(session.turns[1].audio) == pytest.approx(500, abs=2)
    assert [(finding.code, finding.utterance) for finding in findings] == [
        ("W_RESAMPLED", "s/1"),
        ("E_TOO_SHORT", "s/2"),
    ]


def test_cuts_have_neither_gap_nor_overlap(tmp_path: Path) -> None:
    session = dialogue(tmp_path, noise(3, SAMPLE_RATE, 1))
    times = (0.0, 1.00003, 1.99996, 3.0)
    for turn, start, end in zip(session.turns, times, times[1:], strict=False):
        turn.start, turn.end = start, end
    [recording] = cut(session, {}, []).values()
    assert np.array_equal(np.concatenate([turn.audio for turn in session.turns]), recording.pcm[0])
