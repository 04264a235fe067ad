"""Augmentation of training clips: speed perturbation and added noise, drawn for every utterance in every epoch.

The random values depend only on the seed of the run, the epoch and the utterance. They do not depend on the order or
size of batches, the number of workers, the reader, or a resume.
"""

import math
import zlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.config import AugmentConfig
from data.corpus.audio import MIN_SAMPLES


@dataclass(frozen=True, slots=True)
class AugmentSeed:
    """The seed of the augmentation of all utterances in an epoch."""

    seed: int  # of the run
    epoch: int  # from 0

    def generator(self, utterance: str) -> np.random.Generator:
        """Return the generator of an utterance. SpecAugment uses a different one."""
        return np.random.default_rng([self.seed, self.epoch, zlib.crc32(f"sound of {utterance}".encode())])


def augment_clip(clip: np.ndarray, config: AugmentConfig, seed: AugmentSeed, utterance: str) -> np.ndarray:
    """Return an int16 clip with random speed and noise; its length depends on the speed.

    Args:
        clip: int16 samples.
        config: settings of the augmentation.
        seed: seed of the epoch.
        utterance: id of the turn with the clip; all items that use the clip in an epoch get the same result.
    """
    rng = seed.generator(utterance)
    # Always three values, so that one setting does not change what is drawn for another.
    choice, chance, position = rng.random(3)
    if config.speeds:
        clip = change_speed(clip, config.speeds[int(choice * len(config.speeds))])
    if config.noise_db is not None and chance < config.noise_probability:
        low, high = config.noise_db
        clip = add_noise(clip, low + position * (high - low), rng)
    return clip


def change_speed(clip: np.ndarray, speed: float) -> np.ndarray:
    """Play an int16 clip faster (above 1) or slower, which changes tempo and pitch.

    This is the speed perturbation of Ko et al. (2015), Audio Augmentation for Speech Recognition, Interspeech. A clip
    that would become shorter than MIN_SAMPLES is not changed.
    """
    if speed == 1 or _samples(len(clip), speed) < MIN_SAMPLES:
        return clip
    from scipy.signal import resample_poly

    ratio = _ratio(speed)
    return _pcm16(resample_poly(clip.astype(np.float64), up=ratio.denominator, down=ratio.numerator))


def add_noise(clip: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add white noise to an int16 clip at a ratio to the power of the clip, so that silence stays silence."""
    power = np.mean(np.square(clip, dtype=np.float64))
    return _pcm16(clip + rng.standard_normal(len(clip)) * np.sqrt(power / 10 ** (snr_db / 10)))


def possible_samples(samples: int, config: AugmentConfig) -> tuple[int, int]:
    """Return the number of samples of a clip at the fastest and at the slowest speed; one may be the original."""
    possible = [samples, *(_samples(samples, speed) for speed in config.speeds)]
    return min(size for size in possible if size >= min(samples, MIN_SAMPLES)), max(possible)


def _samples(samples: int, speed: float) -> int:
    return math.ceil(samples / _ratio(speed))


def _ratio(speed: float) -> Fraction:
    return Fraction(round(100 * speed), 100)  # small numbers, because the filter grows with them


def _pcm16(signal: np.ndarray) -> np.ndarray:
    pcm: np.ndarray = np.round(signal).clip(-32768, 32767).astype("<i2")
    return pcm
