"""What earlier sweeps advise: of several draws of the sampler, a search takes the one that they expect most of.

Trials of earlier sweeps are the observations of a Gaussian process over the axes of this search
(`sweep.search.sampling.surrogate`); values are standardised within each sweep. An earlier sweep counts less the
more it differs: its observations have the noise of this sweep's trials, divided by its weight. Own trials are
observations, too, so they outvote the earlier ones where they contradict them; and the more there are, the fewer draws
are compared, until the sampler draws alone. As with priors of experts (Hvarfner et al., 2022), the advice fades. One
in three trials is drawn without advice, so that a search sees what earlier sweeps do not expect.

What was taken from which sweep is kept in `earlier.json` in the sweep's folder from its start on, so that a resumed
search draws the same trials, whatever has become of the other sweeps.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ValidationError

from data.atomic import write_file
from data.errors import UserError
from sweep.config.schema import Config
from sweep.config.space import Value
from sweep.search.sampling.history import params
from sweep.search.sampling.surrogate import NOISE, Surrogate

FILE = "earlier.json"
DRAWS, FADES = 32, 4  # draws that are compared for the first trial, and own trials after which they are half as many
ALONE = 3  # one in so many trials is drawn without advice


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
        surrogate = Surrogate(config, self.known, values, noise)
        own = [(params(config, trial), value) for trial in trials if (value := self._value(trial)) is not None]
        if own:
            sign = 1 if config.search.direction == "maximize" else -1
            reached = np.array([sign * value for _, value in own])
            expected = surrogate.expected([drawn for drawn, _ in own])
            spread = next((sweep.spread for sweep in sweeps if sweep.spread), None) or float(reached.std()) or 1.0
            # Another seed or corpus shifts all values, so only their differences are compared with what was expected.
            standard = np.clip((reached - np.median(reached)) / spread, -3, 3) + np.median(expected)
            known = [*self.known, *(drawn for drawn, _ in own)]
            surrogate = Surrogate(config, known, [*values, *standard], [*noise, *[NOISE] * len(own)])
        self.surrogate = surrogate

    def _value(self, trial: FrozenTrial) -> float | None:
        value = float(trial.values[0]) if trial.state == TrialState.COMPLETE else None
        return value if value is not None and math.isfinite(value) else None
