"""Files whose header, name or level says something else than their samples: all of a recording is read."""

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from data.corpus import audio
from data.corpus.audio import SAMPLE_RATE, read_recording
from data.corpus.issues import Finding
from data.corpus.schema import Conversation, Turn
from data.errors import DataError
from data.importers.base.recordings import SUFFIXES, recordings_by_name
from data.preparation.validate import cut

SECONDS = 6.0


def tone(seconds: float = SECONDS, level: float = 0.3, rate: int = SAMPLE_RATE) -> np.ndarray:
    wave: np.ndarray = level * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)
    return wave.astype(np.float32)


def content(kind: str, signal: np.ndarray, subtype: str | None = None) -> bytearray:
    soundfile.write(sink := io.BytesIO(), signal, SAMPLE_RATE, format=kind, subtype=subtype)
    return bytearray(sink.getvalue())


def encoded(path: Path, codec: str, rate: int = 44_100, pause: float = 0.0) -> Path:
    """Write a tone with FFmpeg; with a pause, the packets after 2 s come later, as a paused recorder writes them."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 12_200 if "amr" in codec else 64_000
        signal = tone(rate=rate)
        for number, start in enumerate(range(0, len(signal), 1024)):
            frame = av.AudioFrame.from_ndarray(signal[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, number * 1024 + (round(pause * rate) if start > 2 * rate else 0)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def findings_of(path: Path) -> list[Finding]:
    session = Conversation("s", "s", [Turn("s/0", 0, "client", "x", start=0.0, end=1.0)], recording=path)
    findings: list[Finding] = []
    cut(session, {}, findings)
    return findings


LENGTHS: dict[str, tuple[bytes, int, str]] = {  # container: the chunk, where its length is, and how it is written
    "WAV": (b"data", 4, "<I"),
    "AIFF": (b"SSND", 4, ">I"),
    "CAF": (b"data", 4, ">q"),
    "AU": (b".snd", 8, ">I"),
    "RF64": (b"ds64", 16, "<Q"),
}


@pytest.mark.parametrize("announced", [0.0, 2.0])
@pytest.mark.parametrize("kind", LENGTHS)
def test_length_that_was_never_written_is_found(kind: str, announced: float, tmp_path: Path) -> None:
    """A recorder that crashed; the finding has both figures."""
    chunk, offset, form = LENGTHS[kind]
    whole = content(kind, tone(), "PCM_16")
    added = {"AIFF": 8, "CAF": 4}.get(kind, 0)
    struct.pack_into(form, whole, whole.index(chunk) + offset, round(announced * 2 * SAMPLE_RATE) + added)
    (path := tmp_path / "x").write_bytes(whole)
    found = read_recording(path)
    assert found.duration == SECONDS
    assert found.announced == pytest.approx(announced)
    expected = np.round(np.round(tone() * 32768) / 32768 * 32767)
    assert abs(found.pcm[0] - expected).max() <= 2
    (finding,) = findings_of(path)
    assert finding.code == "W_LENGTH"
    assert f"contains 6.00 s, but its header announces {announced:.2f} s" in finding.message


def test_chunks_after_the_samples_are_not_audio(tmp_path: Path) -> None:
    """Editors write metadata, padding or a tag at the end."""
    plain = bytes(content("WAV", tone(), "PCM_16"))
    (tmp_path / "x.wav").write_bytes(plain)
    expected = read_recording(tmp_path / "x.wav").pcm
    metadata = (
        b"LIST" + struct.pack("<I", 40_000) + b"INFOIART" + bytes(39_992) + b"id3 " + struct.pack("<I", 3) + b"abc\0"
    )
    for tail in (metadata, bytes(4096), b"TAG" + bytes(125)):
        (tmp_path / "x.wav").write_bytes(plain + tail)
        assert np.array_equal(read_recording(tmp_path / "x.wav").pcm, expected)
        assert findings_of(tmp_path / "x.wav") == []
    empty = content("WAV", tone(0), "PCM_16") + metadata
    (tmp_path / "x.wav").write_bytes(empty)
    assert read_recording(tmp_path / "x.wav").duration == 0


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC"])
def test_truncated_file_is_compared_with_its_header(kind: str, tmp_path: Path) -> None:
    whole = content(kind, tone(), "PCM_16")
    (path := tmp_path / "x").write_bytes(whole[: len(whole) // 2])
    (finding,) = findings_of(path)
    assert finding.code == "W_TRUNCATED"
    assert "but its header announces 6.00 s; copy it again" in finding.message
    assert 2 < read_recording(path).duration < 4


@pytest.mark.parametrize("announced", [0, 2 * SAMPLE_RATE])
def test_flac_of_unknown_or_wrong_length_is_read(announced: int, tmp_path: Path) -> None:
    whole = content("FLAC", tone())
    struct.pack_into(">I", whole, 22, announced)
    (path := tmp_path / "x.flac").write_bytes(whole)
    found = read_recording(path)
    assert found.duration == SECONDS
    assert found.announced == (announced / SAMPLE_RATE or None)
    (tmp_path / "y.flac").write_bytes(content("FLAC", tone()))
    assert np.array_equal(found.pcm, read_recording(tmp_path / "y.flac").pcm), "both decoders are exact"


def test_chained_and_joined_files_are_read_to_the_end(tmp_path: Path) -> None:
    """libsndfile stops after the first part."""
    for kind, subtype in (("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)):
        parts = [bytes(content(kind, tone(level=level), subtype)) for level in (0.3, 0.1)]
        (path := tmp_path / "x").write_bytes(b"".join(parts))
        found = read_recording(path)
        assert found.duration == pytest.approx(2 * SECONDS, abs=0.2), subtype
        assert abs(found.pcm[0, 7 * SAMPLE_RATE : -SAMPLE_RATE]).max() == pytest.approx(0.1 * 32767, rel=0.2)
        assert [finding.code for finding in findings_of(path)] in (["W_LENGTH"], ["W_LENGTH", "W_RESAMPLED"])


def test_mp3_of_variable_rate_without_header_is_read(tmp_path: Path) -> None:
    """libsndfile estimates its length from the first frame: silence, then noise at 20 times the rate."""
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 3 * SAMPLE_RATE).astype(np.float32)
    signal = np.concatenate([noise, np.zeros(5 * SAMPLE_RATE, np.float32)])
    soundfile.write(
        sink := io.BytesIO(), signal, SAMPLE_RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5
    )
    whole = sink.getvalue()
    start = whole.index(b"\xff", whole.index(b"Xing"))  # the frame after the one that counts the frames
    (path := tmp_path / "x.mp3").write_bytes(whole[start:])
    with soundfile.SoundFile(path) as file:
        assert file.frames / SAMPLE_RATE < 6, "the estimate is wrong"
    assert read_recording(path).duration == pytest.approx(8, abs=0.2)
    assert "W_LENGTH" in {finding.code for finding in findings_of(path)}


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("x.m4a", "aac", 44_100),
        ("x.mp4", "aac", 48_000),
        ("x.webm", "libopus", 48_000),
        ("x.aac", "aac", 16_000),
        ("x.wma", "wmav2", 44_100),
        ("x.amr", "libopencore_amrnb", 8_000),
        ("x.mka", "libopus", 48_000),
    ],
)
def test_recordings_of_phones_and_meetings_are_read(name: str, codec: str, rate: int, tmp_path: Path) -> None:
    try:
        path = encoded(tmp_path / name, codec, rate)
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg does not write {codec} ({error})")
    found = read_recording(path)
    assert found.duration == pytest.approx(SECONDS, abs=0.15)
    spectrum = abs(np.fft.rfft(found.pcm[0][SAMPLE_RATE : 5 * SAMPLE_RATE]))
    assert spectrum.argmax() / 4 == pytest.approx(300, abs=1)
    assert found.source_rate == rate
    assert {finding.code for finding in findings_of(path)} <= {"W_RESAMPLED"}
    assert recordings_by_name(tmp_path) == {"x": path}


def test_pause_of_the_recorder_keeps_later_times(tmp_path: Path) -> None:
    path = encoded(tmp_path / "x.m4a", "aac", pause=3.0)
    found = read_recording(path)
    assert found.duration == pytest.approx(SECONDS + 3, abs=0.2)
    assert abs(found.pcm[0, round(2.5 * SAMPLE_RATE) : round(4.5 * SAMPLE_RATE)]).max() < 10
    finding = next(finding for finding in findings_of(path) if finding.code == "W_AUDIO_GAP")
    assert "3.0" in finding.message


def test_blocks_of_ffmpeg_equal_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encoded(tmp_path / "x.m4a", "aac")
    whole = read_recording(path).pcm
    monkeypatch.setattr(audio, "_BLOCK", 3)
    monkeypatch.setattr(audio, "_IN_MEMORY", 50_000)
    found = read_recording(path).pcm
    assert found.shape == whole.shape
    assert abs(found.astype(int) - whole).max() <= 1


def test_long_recording_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stereo = np.stack([tone(), tone(level=0.1)], axis=1)
    soundfile.write(tmp_path / "x.wav", stereo, SAMPLE_RATE)
    plain = [read_recording(tmp_path / "x.wav", separate=separate).pcm for separate in (False, True)]
    monkeypatch.setattr(audio, "_BLOCK", 2)
    monkeypatch.setattr(audio, "_IN_MEMORY", 0)
    for separate, expected in zip((False, True), plain, strict=True):
        assert np.array_equal(read_recording(tmp_path / "x.wav", separate=separate).pcm, expected)


@pytest.mark.parametrize("level", [1.5, 30_000.0])
def test_float_samples_beyond_full_scale_are_scaled(level: float, tmp_path: Path) -> None:
    """Some tools write integers as floats, which were all cut off."""
    for name, signal in (("loud", tone(level=level)), ("plain", tone(level=0.95))):
        soundfile.write(tmp_path / f"{name}.wav", signal, SAMPLE_RATE, subtype="FLOAT")
    found, expected = (read_recording(tmp_path / f"{name}.wav") for name in ("loud", "plain"))
    assert abs(found.pcm.astype(int) - expected.pcm).max() <= 1
    assert [finding.code for finding in findings_of(tmp_path / "loud.wav")] == ["W_SCALED"]
    assert f"the peak is {level:.2f} x full scale" in findings_of(tmp_path / "loud.wav")[0].message
    assert expected.gain == 1.0


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("x.m3u8", b"#EXTM3U\n#EXTINF:1,\nother.wav\n"),
        ("x.m4a", b"ffconcat version 1.0\nfile other.wav\n"),
        ("x.wav", b"<html>not found</html>"),
        ("x.mp3", bytes(np.random.default_rng(1).integers(0, 255, 50_000, np.uint8))),
        ("x.wav", b""),
    ],
)
def test_files_without_samples_are_refused(name: str, whole: bytes, tmp_path: Path) -> None:
    """A playlist would read other files."""
    soundfile.write(tmp_path / "other.wav", tone(), SAMPLE_RATE)
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(DataError, match="not readable as audio"):
        read_recording(tmp_path / name)


def test_every_suffix_is_found_by_name(tmp_path: Path) -> None:
    for number, suffix in enumerate(SUFFIXES):
        (tmp_path / f"s{number}{suffix.upper()}").touch()
    assert len(recordings_by_name(tmp_path)) == len(set(SUFFIXES))
