"""Decode, mix down, resample and encode audio. Times are converted to sample indices in one place (`samples`)."""

import contextlib
import io
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data.corpus.decoding import Decoder, StoredClip, open_recording
from data.corpus.ffmpeg import FFmpegDecoder
from data.corpus.schema import SAMPLE_RATE
from data.errors import DataError

Select = Callable[[np.ndarray], np.ndarray]  # a block [n, n_channels] → the channels that are kept [n, n_kept]

MIN_SAMPLES = SAMPLE_RATE // 10  # a clip of less than 0.1 s contains no speech
_BLOCK = 60  # s that are decoded at a time; one hour of stereo would take a gigabyte
_CONTEXT = 1  # s on both sides of a block for the resampling kernel, which needs a few ms
_MAX_KERNEL = 5e7  # size of a resampling kernel: 44100 Hz needs 1e5 numbers, a rate coprime to ours gigabytes
_IN_MEMORY = 1 << 25  # bytes of a decoded recording, 17 min; a longer one is kept in a temporary file
_FULL_SCALE = 0.95  # peak of a file that is scaled down; the rest is for the resampling, which overshoots
_FEW_CHANNELS = 7
_CANCELLED = 0.06  # ratio of the power of the mix to that of the loudest channel, -12 dB


@dataclass(frozen=True, slots=True)
class Recording:
    """A decoded recording at SAMPLE_RATE, and the properties of its file."""

    pcm: np.ndarray  # int16 [n_channels, n_samples]; one channel if it was mixed down
    source_rate: int  # Hz
    source_channels: int
    broken: np.ndarray  # times (s) of NaN or infinite samples, in order; these samples are 0 in `pcm`
    announced: float | None = None  # length (s) by the header of the file; None if it says nothing
    tolerance: float = 0.0  # s by which a correct header may differ from the decoded length
    peak: float = 0.0  # of the decoded samples; 1 is full scale
    gain: float = 1.0  # factor of the samples; less than 1 if the peak exceeds full scale
    filled: float = 0.0  # s of silence where the recorder paused

    @property
    def duration(self) -> float:
        """Return the length in seconds."""
        return float(self.pcm.shape[1] / SAMPLE_RATE)


def samples(seconds: float) -> int:
    """Return the sample index of a time. This is the only rounding rule of the project."""
    return round(seconds * SAMPLE_RATE)


def exists(source: Path | StoredClip) -> bool:
    """Return whether a file exists; False for a name that the file system rejects."""
    try:
        return (source.path if isinstance(source, StoredClip) else source).is_file()
    except OSError:
        return False


def read_recording(source: Path | StoredClip, *, separate: bool = False) -> Recording:
    """Decode a file in any format that libsndfile or FFmpeg reads, block by block to its end, and resample it.

    A file whose samples exceed full scale, as float files may, is scaled down as a whole.

    Args:
        source: the audio file, or a cell of a table with its bytes.
        separate: keep the channels. By default they are mixed down to their mean, or to the loudest channel if the
            channels cancel each other out.

    Raises:
        DataError: the file cannot be decoded.
    """
    import soundfile

    try:
        with contextlib.nullcontext(source) if isinstance(source, Path) else source.as_file() as path:
            try:
                with open_recording(path) as file:
                    return _read(file, separate)
            except soundfile.LibsndfileError:  # FFmpeg reads what comes before the damage
                with contextlib.closing(FFmpegDecoder(path)) as file:
                    return _read(file, separate)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: not readable as audio ({error}); convert it to WAV or FLAC") from None


def _read(file: Decoder, separate: bool) -> Recording:
    """Read an open file; see `read_recording`."""
    _check_rate(file.rate)
    select: Select = _all_channels
    if not separate and file.channels > 1:
        power = np.zeros(1 + file.channels)

        def mix(block: np.ndarray) -> np.ndarray:
            mono = _mean(block)
            power[:] += _power(mono, block)
            return mono

        select, recording = _mean, _decode(file, mix)
        if power[0] < _CANCELLED * power[1:].max():
            loudest = int(power[1:].argmax())

            def select_loudest(block: np.ndarray) -> np.ndarray:
                return block[:, [loudest]]

            file.restart()
            select, recording = select_loudest, _decode(file, select_loudest)
    else:
        recording = _decode(file, select)
    if recording.peak > file.limit:
        file.restart()
        recording = _decode(file, select, _FULL_SCALE / recording.peak)
    return recording


def _all_channels(block: np.ndarray) -> np.ndarray:
    return block


def _mean(block: np.ndarray) -> np.ndarray:
    """Return the mean of the channels [n, 1]. Adding up to seven one by one gives the bits of NumPy's, faster."""
    channels = block.shape[1]
    if channels > _FEW_CHANNELS:
        mono: np.ndarray = block.mean(axis=1, keepdims=True)
        return mono
    total = block[:, 0].copy()
    for channel in range(1, channels):
        total += block[:, channel]
    total /= np.float32(channels)
    return total[:, None]


def _power(mono: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Return the sum of squares of the mix and of each channel [1 + n_channels]."""
    if block.shape[1] > _FEW_CHANNELS:
        squares: np.ndarray = np.square(np.concatenate([mono, block], axis=1), dtype=np.float64).sum(axis=0)
        return squares
    signals = [mono[:, 0], *np.ascontiguousarray(block.T)]
    # In double precision: the power of a channel and of its inverted copy differ only by the rounding of samples.
    return np.array([np.einsum("i,i->", signal, signal, dtype=np.float64) for signal in signals])


def _check_rate(rate: int) -> None:
    """Raise a ValueError if the resampling kernel would fill the memory."""
    if rate < 1 or rate * SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE) ** 2 > _MAX_KERNEL:
        raise ValueError(f"{rate} Hz")


def _decode(file: Decoder, select: Select, gain: float = 1.0) -> Recording:
    """Read an open file in overlapping blocks; each sample comes from the block that has more context around it.

    Args:
        file: an open file at its start.
        select: maps a block [n, n_channels] to the channels that are kept [n, n_kept].
        gain: factor of the samples.
    """
    rate, broken, peak = file.rate, [], 0.0
    pcm = SampleStore()
    for number, (block, last) in enumerate(_blocks(file)):
        finite = np.isfinite(block)
        if not finite.all():
            bad = ~finite.all(axis=1)
            broken.append(number * _BLOCK + np.flatnonzero(bad) / rate)
            block[bad] = 0
        selected = select(block)
        if selected.size:
            peak = max(peak, float(selected.max()), -float(selected.min()))
        resampled = _resample(selected.T if gain == 1.0 else selected.T * np.float32(gain), rate)
        end = resampled.shape[1] if last else (_BLOCK + _CONTEXT) * SAMPLE_RATE
        pcm.append(_pcm16(resampled[:, _CONTEXT * SAMPLE_RATE if number else 0 : end]))
    times = np.concatenate(broken) if broken else np.empty(0)
    properties = (file.announced, file.tolerance, peak, gain, file.filled)
    return Recording(pcm.joined(), rate, file.channels, times, *properties)


def _blocks(file: Decoder) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield blocks [n, n_channels] that overlap by twice the context, and whether each is the last one."""
    overlap = 2 * _CONTEXT * file.rate
    tail = np.empty((0, file.channels), np.float32)
    while True:
        wanted = _BLOCK * file.rate + overlap - len(tail)
        read = file.read(wanted)
        block = np.concatenate([tail, read])
        yield block, len(read) < wanted
        if len(read) < wanted:
            return
        tail = block[-overlap:].copy()


class SampleStore:
    """Collects the samples of a recording: in memory, or in a temporary file if the recording is long."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.bytes = 0
        self.file: IO[bytes] | None = None
        self.channels = 1

    def append(self, part: np.ndarray) -> None:
        """Add int16 samples [n_channels, n]."""
        self.channels = len(part)
        self.parts.append(part)
        self.bytes += part.nbytes
        if self.bytes > _IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        if self.file is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `joined`)
        for part in self.parts:
            self.file.write(np.ascontiguousarray(part.T).data)
        self.parts = []

    def joined(self) -> np.ndarray:
        """Return all samples [n_channels, n]; pages of the temporary file are read when they are used."""
        if self.file is None:
            return np.concatenate(self.parts, axis=1) if self.parts else np.zeros((1, 0), np.int16)
        self._spill()
        self.file.flush()
        frames = np.memmap(self.file, "<i2", mode="r", shape=(self.bytes // 2 // self.channels, self.channels))
        self.file.close()  # the map keeps the file, which has no name
        return np.asarray(frames).T


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
