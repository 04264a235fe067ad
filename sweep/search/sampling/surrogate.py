"""A Gaussian process over the axes of a search: how good a trial is expected to be, given some that are known.

The equations are those of Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006): the mean of chapter
2, and the residuals of leaving one observation out of section 5.4.2. The kernel is a product over the axes: a Gaussian
of the distance on numbers, and a constant where choices differ, or where only one of two trials has a value.

Shapes: T known trials, C candidates.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sweep.config.schema import Config
from sweep.config.space import Axis, Value, Values

WIDTH, OTHER = 0.25, 0.4  # kernel: of numbers, as a share of their range; and where choices differ
NOISE = 0.3  # variance of an observation, of values with variance 1


class Surrogate:
    """The mean of a Gaussian process.

    Args:
        config: of the sweep, with the axes.
        known: values on the axes of each known trial.
        values: what each is worth, with mean 0 and variance 1 or so.
        noise: variance of each.
    """

    def __init__(
        self, config: Config, known: Sequence[Values], values: Sequence[float], noise: Sequence[float]
    ) -> None:
        self.space, self.known = config.search.space, known
        self._inverse_TT = np.linalg.inv(self._kernel(known, known) + np.diag(noise))
        self._weights_T = self._inverse_TT @ np.array(values)

    def expected(self, candidates: Sequence[Values]) -> np.ndarray:
        """Return what trials are expected to be worth, [C]."""
        expected_C: np.ndarray = self._kernel(candidates, self.known) @ self._weights_T
        return expected_C

    def residuals(self) -> np.ndarray:
        """Return the value of each known trial minus what the others let expect, [T]."""
        residuals_T: np.ndarray = self._weights_T / np.diag(self._inverse_TT)
        return residuals_T

    def _kernel(self, first: Sequence[Values], second: Sequence[Values]) -> np.ndarray:
        """Return how similar trials are, [len(first), len(second)]."""
        similar = np.ones((len(first), len(second)))
        for key, axis in self.space.items():
            left, right = ([position(axis, values, key) for values in side] for side in (first, second))
            if axis.is_numeric:
                distance = np.subtract.outer(np.array(left, dtype=float), np.array(right, dtype=float))
                neither = np.logical_and.outer(np.isnan(np.array(left, float)), np.isnan(np.array(right, float)))
                alike = np.where(
                    neither, 1.0, np.where(np.isnan(distance), OTHER, np.exp(-0.5 * (distance / WIDTH) ** 2))
                )
                similar *= alike
            else:
                similar *= np.where(np.equal.outer(np.array(left), np.array(right)), 1.0, OTHER)
        return similar


def position(axis: Axis, values: Mapping[str, Value], key: str) -> float | str:
    """Return where a trial is on an axis: from 0 to 1 on numbers, NaN where it has none, and else its choice."""
    value = values.get(key)
    if not axis.is_numeric:
        return repr(value) if key in values else ""
    if not isinstance(value, int | float):
        return math.nan
    numbers = sorted(number for number in axis.extremes() if isinstance(number, int | float))
    if axis.choices is not None:  # steps of equal size, since choices are often 2, 4, 8
        return float(np.interp(value, numbers, np.linspace(0, 1, len(numbers)))) if len(numbers) > 1 else 0.0
    low, high = numbers[0], numbers[-1]
    if axis.log:
        return math.log(max(value, 1e-300) / low) / math.log(high / low) if high > low else 0.0
    return (value - low) / (high - low) if high > low else 0.0
