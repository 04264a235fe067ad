"""Recordings to clips: decode, mix down, resample and cut; all time arithmetic goes through whole samples."""

import io
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus.schema import SAMPLE_RATE
from data.errors import DataError

MIN_SAMPLES = SAMPLE_RATE // 10  # a clip under 0.1 s holds no speech
_BLOCK = 60  # s of a recording that are decoded at once: an hour in stereo would fill a gigabyte
_CONTEXT = 1  # s on both sides of a block that resampling may look at; its kernel needs a few ms
_KERNEL = 5e7  # numbers of a resampling kernel at most: 44100 Hz needs 1e5, a rate that nothing divides gigabytes
_CANCELLED = 0.06  # power of the mix over that of the louder channel: 12 dB below


@dataclass(frozen=True, slots=True)
class Recording:
    """Samples at SAMPLE_RATE, and what the file was before."""

    pcm: np.ndarray  # int16 [n_channels, n_samples]; one channel if mixed down
    source_rate: int  # Hz
    source_channels: int
    broken: np.ndarray  # times (s) of samples that were NaN or infinite, in order; they are 0 in `pcm`
    missing: float = 0.0  # s that the file announces and does not hold

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return float(self.pcm.shape[1] / SAMPLE_RATE)


def samples(seconds: float) -> int:
    """The sample index of a time: the one rounding rule of the project."""
    return round(seconds * SAMPLE_RATE)


def exists(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is not."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_recording(path: Path, *, separate: bool = False) -> Recording:
    """Decode a whole file (any format soundfile reads), block by block, and resample it.

    Args:
        path: of the file.
        separate: keep the channels apart. Otherwise they are mixed down: the mean, or the loudest one where the
            channels cancel each other out.

    Raises:
        DataError: the file cannot be decoded.
    """
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            _check_rate(file.samplerate)
            if separate or file.channels == 1:
                return _decode(file, lambda block: block)
            power = np.zeros(1 + file.channels)

            def mix(block: np.ndarray) -> np.ndarray:
                mono: np.ndarray = block.mean(axis=1, keepdims=True)
                power[:] += np.square(np.concatenate([mono, block], axis=1), dtype=np.float64).sum(axis=0)
                return mono

            mixed = _decode(file, mix)
            if power[0] >= _CANCELLED * power[1:].max():
                return mixed
            loudest = int(power[1:].argmax())
            file.seek(0)
            return _decode(file, lambda block: block[:, [loudest]])
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as audio ({error}); convert it to WAV or FLAC") from None


def _check_rate(rate: int) -> None:
    """Raise a ValueError where resampling would fill the memory."""
    if rate < 1 or rate * SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE) ** 2 > _KERNEL:
        raise ValueError(f"{rate} Hz")


def _decode(file: Any, pick: Callable[[np.ndarray], np.ndarray]) -> Recording:
    """Read an open file in overlapping blocks; what lies in two of them is taken from the one that sees more around it.

    Args:
        file: a `soundfile.SoundFile` at its start.
        pick: [n, channels] → [n, those that are kept].
    """
    rate, parts, broken = file.samplerate, [], []
    held = 0
    for number, (block, last) in enumerate(_blocks(file)):
        held = number * _BLOCK * rate + len(block)
        bad = ~np.isfinite(block).all(axis=1)
        if bad.any():
            broken.append(number * _BLOCK + np.flatnonzero(bad) / rate)
            block[bad] = 0
        resampled = _resample(pick(block).T, rate)
        end = resampled.shape[1] if last else (_BLOCK + _CONTEXT) * SAMPLE_RATE
        parts.append(_pcm16(resampled[:, _CONTEXT * SAMPLE_RATE if number else 0 : end]))
    pcm = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0), np.int16)
    times = np.concatenate(broken) if broken else np.empty(0)
    return Recording(pcm, rate, file.channels, times, max(0.0, (file.frames - held) / rate))


def _blocks(file: Any) -> Iterator[tuple[np.ndarray, bool]]:
    """Blocks [n, channels] that overlap by twice the context, and whether each is the last one.

    Not `SoundFile.blocks`: that believes the length in the header, and fills up what is not there with old memory.
    """
    overlap = 2 * _CONTEXT * file.samplerate
    tail = np.empty((0, file.channels), np.float32)
    while True:
        wanted = _BLOCK * file.samplerate + overlap - len(tail)
        read = file.read(wanted, dtype="float32", always_2d=True)
        block = np.concatenate([tail, read])
        yield block, len(read) < wanted
        if len(read) < wanted:
            return
        tail = block[-overlap:].copy()


def _resample(signal: np.ndarray, rate: int) -> np.ndarray:
    """[channels, n] → [channels, n x SAMPLE_RATE / rate]."""
    if rate == SAMPLE_RATE or not signal.size:
        return signal
    import torch
    import torchaudio.functional

    contiguous = torch.from_numpy(np.ascontiguousarray(signal))
    resampled: np.ndarray = torchaudio.functional.resample(contiguous, rate, SAMPLE_RATE).numpy()
    return resampled


def _pcm16(signal: np.ndarray) -> np.ndarray:
    pcm: np.ndarray = (np.clip(signal, -1.0, 1.0) * 32767.0).round().astype("<i2")
    return pcm


def encode(pcm: np.ndarray, codec: str) -> bytes:
    """int16 samples → bytes of a codec: pcm16 (little endian) or flac (lossless)."""
    if codec == "pcm16":
        return pcm.astype("<i2").tobytes()
    import soundfile

    sink = io.BytesIO()
    soundfile.write(sink, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return sink.getvalue()


def decode(content: bytes | memoryview, codec: str) -> np.ndarray:
    """The inverse of `encode`; not a copy for pcm16."""
    if codec == "pcm16":
        return np.frombuffer(content, "<i2")
    import soundfile

    pcm: np.ndarray = soundfile.read(io.BytesIO(content), dtype="int16")[0]
    return pcm


def checksum(content: bytes | memoryview) -> int:
    """CRC-32 of stored bytes."""
    return zlib.crc32(content)


def waveform(pcm: np.ndarray) -> np.ndarray:
    """int16 samples → float32 in [-1, 1)."""
    return pcm.astype(np.float32) / 32768.0


def level(pcm: np.ndarray) -> tuple[float, float]:
    """Peak in [0, 1] and root mean square in dB relative to full scale."""
    if len(pcm) == 0:
        return 0.0, -120.0
    wave = waveform(pcm)
    rms = float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    return float(np.abs(wave).max()), max(-120.0, 20 * np.log10(max(rms, 1e-6)))
