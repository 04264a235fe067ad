"""The shapes of a search: what its axes may ask for, as far as it changes what a trial takes of time and memory."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.config.space import Axis
from sweep.search.candidates import Candidate, Values, draw, representatives, resolve_candidate

MOST = 16  # shapes that are tried
# Settings that change neither, or by a position of a hundred. What is not named here counts.
NO_MATTER = (
    "seed",
    "data.fold",
    "data.sound",
    "data.snr_db",
    "model.adapter.init_",
    "model.cls",
    "model.encoder.spec_augment",
    "model.end_of_audio",
    "model.lora.alpha",
    "model.lora.rslora",
    "model.priors",
    "train.checkpoint_",
    "train.class_weights",
    "train.epochs",
    "train.learning_rate",
    "train.losses.next_token",
    "train.losses.temperature",
    "train.max_grad_norm",
    "train.patience",
    "train.sampling",
    "train.schedule",
    "train.warmup",
    "train.weight_decay",
)
# Numbers of which only counts whether they are 0.
SIGN = ("tasks.", "train.losses.", "model.lora.dropout", "model.encoder.dropout", "data.augment.noise_probability")
LARGEST = ("model.lora.rank",)  # numbers of which the largest says whether it fits: they take hardly more time


@dataclass(frozen=True)
class TrialProfile:
    """Trials that take the same."""

    values: Values  # of the axes that count
    config: ResolvedConfig  # of such a trial
    weight: float  # its share of all combinations

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.values.items()) or "all trials"


def shapes(config: Config, whole: bool = False) -> tuple[list[TrialProfile], int]:
    """The shapes of trials that may start.

    Args:
        config: of the sweep.
        whole: with every number of a list; else with its least and its largest one, or the latter alone (LARGEST).

    Returns:
        Those to be tried, and how many were left out: of more than MOST, as many are drawn.
    """
    points = config.search.points[: config.search.trials]
    if config.search.trials > len(points):
        options = {key: _values(key, axis, whole) for key, axis in config.search.space.items() if counts_for(key)}
        drawn = representatives(config, options)
    else:
        drawn = [Candidate(draw(config, point), 1) for point in points]
    merged = () if whole else LARGEST
    groups: dict[str, list[Candidate]] = {}
    for candidate in drawn:
        counted = {key: value for key, value in candidate.values.items() if counts_for(key) and key not in merged}
        groups.setdefault(repr(sorted(counted.items())), []).append(candidate)
    names = list(groups) if len(groups) <= MOST else random.Random(0).sample(list(groups), MOST)
    total = sum(candidate.weight for candidate in drawn)
    made = []
    for group in map(groups.__getitem__, names):
        values = max((one.values for one in group), key=lambda values: [values.get(key, 0) for key in LARGEST])
        trial = resolve_candidate(config, values)
        if trial is not None:
            counted = {key: value for key, value in values.items() if counts_for(key)}
            made.append(TrialProfile(counted, trial, sum(one.weight for one in group) / total))
    return made, len(groups) - len(names)


def counts_for(key: str) -> bool:
    """Whether a setting changes what a trial takes."""
    return not key.startswith(NO_MATTER)


def alike(values: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the known shapes that stand for a trial: equal ones; for a number that is not known, both neighbours.

    Args:
        values: of the trial's axes, or of some of them.
        known: values of shapes.
    """
    found = list(range(len(known)))
    for key, value in values.items():
        if counts_for(key):
            near = _near(key, value, [shape[key] for shape in known if key in shape])
            found = [place for place in found if known[place].get(key, value) in (value, *near)]
    return found


def _near(key: str, value: Any, known: Sequence[Any]) -> list[Any]:
    if value in known or not _is_number(value):
        return []
    if key.startswith(SIGN):
        return [other for other in known if (other > 0) == (value > 0)]
    numbers = list(filter(_is_number, known))
    below, above = [other for other in numbers if other < value], [other for other in numbers if other > value]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(key: str, axis: Axis, whole: bool) -> list[Any]:
    values = axis.extremes()
    if not all(map(_is_number, values)):
        return values
    if key.startswith(SIGN):
        return list({value > 0: value for value in values}.values())
    if whole:
        return sorted(values)
    return [max(values)] if key in LARGEST else list(dict.fromkeys((min(values), max(values))))
