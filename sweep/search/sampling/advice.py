"""What earlier sweeps advise: of several draws of the sampler, a search takes the one that they expect most of.

Trials of earlier sweeps are the observations of a Gaussian process (Rasmussen and Williams, 2006, chapter 2) whose
kernel compares the axes of this search; values are standardised within each sweep. An earlier sweep counts less the
more it differs: its observations have the noise of this sweep's trials, divided by its weight. Own trials are
observations, too, so they outvote the earlier ones where they contradict them; and the more there are, the fewer draws
are compared, until the sampler draws alone. As with priors of experts (Hvarfner et al., 2022), the advice fades. One
in three trials is drawn without advice, so that a search sees what earlier sweeps do not expect.

What was taken from which sweep is kept in `earlier.json` in the sweep's folder from its start on, so that a resumed
search draws the same trials, whatever has become of the other sweeps.

Shapes: T observed trials, C candidates, A axes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ValidationError

from data.atomic import write_file
from data.errors import UserError
from sweep.config.schema import Config
from sweep.config.space import Axis, Value, Values
from sweep.search.sampling.history import params

FILE = "earlier.json"
DRAWS, FADES = 32, 4  # draws that are compared for the first trial, and own trials after which they are half as many
ALONE = 3  # one in so many trials is drawn without advice
WIDTH, OTHER = 0.25, 0.4  # kernel: of a range, as a share of it; and the similarity of different choices
NOISE = 0.3  # variance of an observation, of values with variance 1


class EarlierTrial(BaseModel):
    """A trial of an earlier sweep."""

    values: dict[str, Value]  # of the axes of this search, as far as they applied
    value: float  # standardised within its sweep; more is better


class EarlierSweep(BaseModel):
    """What was taken from an earlier sweep."""

    source: str
    differs: list[str]  # in what it differs from this sweep
    weight: float  # of its trials, 1 for a sweep like this one
    spread: float | None  # standard deviation of its values, where it has the objective of this sweep
    trials: list[EarlierTrial]

    def describe(self) -> str:
        """Return the sweep in words."""
        differs = f", {', '.join(self.differs)}" if self.differs else ""
        return f"learns from {self.source}: {len(self.trials)} trials{differs} (weight {self.weight:.2g})"


class Earlier(BaseModel):
    """What a search learns from earlier sweeps."""

    sweeps: list[EarlierSweep] = []
    left_out: list[str] = []  # sweeps that nothing was taken from, and why

    def lines(self) -> list[str]:
        """Return what was taken from where, in words."""
        return [
            *(sweep.describe() for sweep in self.sweeps),
            *(f"learns nothing from {line}" for line in self.left_out),
        ]

    def save(self, folder: Path) -> None:
        """Save it in the folder of a sweep."""
        write_file(folder / FILE, self.model_dump_json(indent=1))


def read_earlier(folder: Path) -> Earlier | None:
    """Return what the sweep in a folder learns from others; None where nothing was taken yet.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    try:
        return Earlier.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise UserError(f"{path}: damaged; restore a copy, or choose another folder with --out") from None


class Advice:
    """How good trials of a search are expected to be.

    Args:
        config: of the sweep.
        sweeps: earlier ones.
        trials: of this sweep.
    """

    def __init__(self, config: Config, sweeps: Sequence[EarlierSweep], trials: Sequence[FrozenTrial]) -> None:
        self.config = config
        weight = max((sweep.weight for sweep in sweeps), default=0.0)
        drawn = sum(trial.state != TrialState.WAITING for trial in trials)
        # Draws to compare; fewer than two: no advice. Otherwise a search would never see what earlier sweeps misjudge.
        self.draws = 0 if drawn % ALONE == ALONE - 1 else round(DRAWS * weight / (1 + drawn / FADES))
        if self.draws < 2:
            return
        self.known = [trial.values for sweep in sweeps for trial in sweep.trials]
        values = [trial.value for sweep in sweeps for trial in sweep.trials]
        noise = [NOISE / sweep.weight for sweep in sweeps for _ in sweep.trials]
        self._fit(self.known, values, noise)
        own = [(params(config, trial), value) for trial in trials if (value := self._value(trial)) is not None]
        if own:
            sign = 1 if config.search.direction == "maximize" else -1
            reached = np.array([sign * value for _, value in own])
            expected = self.expected([drawn for drawn, _ in own])
            spread = next((sweep.spread for sweep in sweeps if sweep.spread), None) or float(reached.std()) or 1.0
            # Another seed or corpus shifts all values, so only their differences are compared with what was expected.
            standard = np.clip((reached - np.median(reached)) / spread, -3, 3) + np.median(expected)
            known = [*self.known, *(drawn for drawn, _ in own)]
            self._fit(known, [*values, *standard], [*noise, *[NOISE] * len(own)])

    def _value(self, trial: FrozenTrial) -> float | None:
        value = float(trial.values[0]) if trial.state == TrialState.COMPLETE else None
        return value if value is not None and math.isfinite(value) else None

    def _fit(self, known: Sequence[Values], values: Sequence[float], noise: Sequence[float]) -> None:
        self._observed, values_T = known, np.array(values)
        kernel_TT = self._kernel(known, known) + np.diag(noise)
        self._weights_T = np.linalg.solve(kernel_TT, values_T)

    def expected(self, candidates: Sequence[Values]) -> np.ndarray:
        """Return the expected value of trials, standardised; more is better, [C]."""
        expected_C: np.ndarray = self._kernel(candidates, self._observed) @ self._weights_T
        return expected_C

    def _kernel(self, first: Sequence[Values], second: Sequence[Values]) -> np.ndarray:
        """Return how similar trials are, [len(first), len(second)]."""
        similar = np.ones((len(first), len(second)))
        for key, axis in self.config.search.space.items():
            left, right = ([position(axis, values, key) for values in side] for side in (first, second))
            if axis.is_numeric:
                distance = np.subtract.outer(np.array(left, dtype=float), np.array(right, dtype=float))
                gauss = np.exp(-0.5 * (distance / WIDTH) ** 2)
                both, neither = ~np.isnan(distance), np.logical_and.outer(np.isnan(left), np.isnan(right))
                similar *= np.where(both, gauss, np.where(neither, 1.0, OTHER))
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
