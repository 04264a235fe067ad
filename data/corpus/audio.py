"""Decode, mix down, resample and encode audio. Times are converted to sample indices in one place (`samples`)."""

import io
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.corpus.schema import SAMPLE_RATE
from data.errors import DataError

if TYPE_CHECKING:
    from soundfile import SoundFile

MIN_SAMPLES = SAMPLE_RATE // 10  # a clip of less than 0.1 s contains no speech
_BLOCK = 60  # s that are decoded at a time; one hour of stereo would take a gigabyte
_CONTEXT = 1  # s on both sides of a block for the resampling kernel, which needs a few ms
_MAX_KERNEL = 5e7  # size of a resampling kernel: 44100 Hz needs 1e5 numbers, a rate coprime to ours gigabytes
_CANCELLED = 0.06  # ratio of the power of the mix to that of the loudest channel, -12 dB


@dataclass(frozen=True, slots=True)
class Recording:
    """A decoded recording at SAMPLE_RATE, and the properties of its file."""

    pcm: np.ndarray  # int16 [n_channels, n_samples]; one channel if it was mixed down
    source_rate: int  # Hz
    source_channels: int
    broken: np.ndarray  # times (s) of NaN or infinite samples, in order; these samples are 0 in `pcm`
    missing: float = 0.0  # s that the header announces but the file does not contain

    @property
    def duration(self) -> float:
        """Return the length in seconds."""
        return float(self.pcm.shape[1] / SAMPLE_RATE)


def samples(seconds: float) -> int:
    """Return the sample index of a time. This is the only rounding rule of the project."""
    return round(seconds * SAMPLE_RATE)


def exists(path: Path) -> bool:
    """Return whether a file exists; False for a name that the file system rejects."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_recording(path: Path, *, separate: bool = False) -> Recording:
    """Decode a file in any format that soundfile reads, block by block, and resample it.

    Args:
        path: the audio file.
        separate: keep the channels. By default they are mixed down to their mean, or to the loudest channel if the
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
    """Raise a ValueError if the resampling kernel would fill the memory."""
    if rate < 1 or rate * SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE) ** 2 > _MAX_KERNEL:
        raise ValueError(f"{rate} Hz")


def _decode(file: "SoundFile", select: Callable[[np.ndarray], np.ndarray]) -> Recording:
    """Read an open file in overlapping blocks; each sample comes from the block that has more context around it.

    Args:
        file: an open file at its start.
        select: maps a block [n, n_channels] to the channels that are kept [n, n_kept].
    """
    rate, parts, broken = file.samplerate, [], []
    read = 0  # samples
    for number, (block, last) in enumerate(_blocks(file)):
        read = number * _BLOCK * rate + len(block)
        bad = ~np.isfinite(block).all(axis=1)
        if bad.any():
            broken.append(number * _BLOCK + np.flatnonzero(bad) / rate)
            block[bad] = 0
        resampled = _resample(select(block).T, rate)
        end = resampled.shape[1] if last else (_BLOCK + _CONTEXT) * SAMPLE_RATE
        parts.append(_pcm16(resampled[:, _CONTEXT * SAMPLE_RATE if number else 0 : end]))
    pcm = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0), np.int16)
    times = np.concatenate(broken) if broken else np.empty(0)
    return Recording(pcm, rate, file.channels, times, max(0.0, (file.frames - read) / rate))


def _blocks(file: "SoundFile") -> Iterator[tuple[np.ndarray, bool]]:
    """Yield blocks [n, n_channels] that overlap by twice the context, and whether each is the last one.

    `SoundFile.blocks` is not used: it trusts the length in the header and fills missing samples with old memory.
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
    """Resample [n_channels, n] to [n_channels, n * SAMPLE_RATE / rate]."""
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
    """Encode int16 samples as pcm16 (little endian) or flac (lossless)."""
    if codec == "pcm16":
        return pcm.astype("<i2").tobytes()
    import soundfile

    sink = io.BytesIO()
    soundfile.write(sink, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return sink.getvalue()


def decode(content: bytes | memoryview, codec: str) -> np.ndarray:
    """Decode the bytes of `encode`; pcm16 is not copied."""
    if codec == "pcm16":
        return np.frombuffer(content, "<i2")
    import soundfile

    pcm: np.ndarray = soundfile.read(io.BytesIO(content), dtype="int16")[0]
    return pcm


def checksum(content: bytes | memoryview) -> int:
    """Return the CRC-32 of stored bytes."""
    return zlib.crc32(content)


def waveform(pcm: np.ndarray) -> np.ndarray:
    """Convert int16 samples to float32 in [-1, 1)."""
    return pcm.astype(np.float32) / 32768.0


def level(pcm: np.ndarray) -> tuple[float, float]:
    """Return the peak in [0, 1] and the root mean square in dB relative to full scale."""
    if len(pcm) == 0:
        return 0.0, -120.0
    wave = waveform(pcm)
    rms = float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    return float(np.abs(wave).max()), max(-120.0, 20 * np.log10(max(rms, 1e-6)))
