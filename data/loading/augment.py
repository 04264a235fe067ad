"""Augmentation of training clips: another speed and added noise, drawn anew for every utterance in every epoch.

What is drawn follows from the run's seed, the epoch and the utterance alone: not from the order or size of batches, the
number of workers, the reader, or where a run was resumed.
"""

import math
import zlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.config import AugmentConfig
from data.corpus.audio import MIN_SAMPLES


@dataclass(frozen=True, slots=True)
class Draw:
    """What the augmentation of an utterance follows from, besides its id."""

    seed: int  # of the run
    epoch: int  # from 0

    def generator(self, utterance: str) -> np.random.Generator:
        """The generator of one utterance; not the one that SpecAugment draws its masks with."""
        return np.random.default_rng([self.seed, self.epoch, zlib.crc32(f"sound of {utterance}".encode())])


def augmented(clip: np.ndarray, config: AugmentConfig, draw: Draw, utterance: str) -> np.ndarray:
    """A clip as it is heard in one epoch of training, int16; its length changes with the speed.

    Args:
        clip: int16.
        config: what may be drawn.
        draw: of the run and epoch.
        utterance: id of the turn that the clip was recorded from: whoever hears it in this epoch hears the same.
    """
    rng = draw.generator(utterance)
    choice, chance, place = rng.random(3)  # always three: what is drawn of one setting does not depend on another
    if config.speeds:
        clip = at_speed(clip, config.speeds[int(choice * len(config.speeds))])
    if config.noise_db is not None and chance < config.noise_probability:
        low, high = config.noise_db
        clip = with_noise(clip, low + place * (high - low), rng)
    return clip


def at_speed(clip: np.ndarray, speed: float) -> np.ndarray:
    """An int16 clip, played faster (above 1) or slower: tempo and pitch change together.

    This is the speed perturbation of Ko et al. (2015), Audio Augmentation for Speech Recognition, Interspeech. A clip
    that it would leave shorter than MIN_SAMPLES stays as it is.
    """
    if speed == 1 or _samples(len(clip), speed) < MIN_SAMPLES:
        return clip
    from scipy.signal import resample_poly

    ratio = _ratio(speed)
    return _pcm16(resample_poly(clip.astype(np.float64), up=ratio.denominator, down=ratio.numerator))


def with_noise(clip: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """An int16 clip with white noise at a ratio to its own power, so that silence stays silence."""
    power = np.mean(np.square(clip, dtype=np.float64))
    return _pcm16(clip + rng.standard_normal(len(clip)) * np.sqrt(power / 10 ** (snr_db / 10)))


def longest(samples: int, config: AugmentConfig) -> int:
    """Samples that a clip has at the slowest speed, and at least as it is."""
    return max([samples, *(_samples(samples, speed) for speed in config.speeds)])


def _samples(samples: int, speed: float) -> int:
    return math.ceil(samples / _ratio(speed))


def _ratio(speed: float) -> Fraction:
    return Fraction(round(100 * speed), 100)  # small numbers: the filter grows with them


def _pcm16(signal: np.ndarray) -> np.ndarray:
    pcm: np.ndarray = np.round(signal).clip(-32768, 32767).astype("<i2")
    return pcm
