"""Recordings to clips: decode, mix down, resample and cut; all time arithmetic goes through whole samples."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.schema import SAMPLE_RATE

MIN_SAMPLES = SAMPLE_RATE // 10  # a clip under 0.1 s holds no speech
TOLERANCE = 0.05  # s: an end this little past the recording is rounding, not a fault


@dataclass(frozen=True, slots=True)
class Recording:
    """Mono samples at SAMPLE_RATE, and what the file was before."""

    pcm: np.ndarray  # int16 [n_samples]
    source_rate: int  # Hz
    source_channels: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.pcm) / SAMPLE_RATE


def samples(seconds: float) -> int:
    """The sample index of a time: the one rounding rule of the project."""
    return round(seconds * SAMPLE_RATE)


def read_recording(path: Path) -> Recording:
    """Decode a whole file (any format soundfile reads), mix it down and resample it.

    Raises:
        DataError: the file cannot be decoded, is empty, or holds NaN or infinite samples.
    """
    import soundfile

    try:
        signal, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"{path}: not readable as audio ({error}); convert it to WAV or FLAC") from None
    if len(signal) == 0:
        raise DataError(f"{path}: the recording is empty")
    mono = _mix_down(signal)
    if not np.isfinite(mono).all():
        raise DataError(f"{path}: the recording holds NaN or infinite samples; export it again")
    return Recording(_pcm16(_resample(mono, rate)), rate, signal.shape[1])


def _mix_down(signal: np.ndarray) -> np.ndarray:
    """Mean of the channels [n, channels] → [n]; the loudest one when they cancel each other out."""
    mono = signal.mean(axis=1)
    energy = (signal**2).mean(axis=0)
    cancelled = (mono**2).mean() < 0.06 * energy.max()  # 12 dB below the louder channel
    return np.ascontiguousarray(signal[:, int(energy.argmax())] if cancelled else mono)


def _resample(mono: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return mono
    import torch
    import torchaudio.functional

    resampled: np.ndarray = torchaudio.functional.resample(torch.from_numpy(mono), rate, SAMPLE_RATE).numpy()
    return resampled


def _pcm16(signal: np.ndarray) -> np.ndarray:
    pcm: np.ndarray = (np.clip(signal, -1.0, 1.0) * 32767.0).round().astype("<i2")
    return pcm


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
