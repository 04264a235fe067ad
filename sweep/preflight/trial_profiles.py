"""Trial profiles: groups of trials that take the same time and memory, as far as the axes of a search change these."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.config.space import Axis, Value, Values
from sweep.search.candidates import Candidate, draw, representatives, resolve_candidate

MAX_PROFILES = 16
# Settings that change neither time nor memory, or by a hundredth. All other settings count.
IRRELEVANT = (
    "seed",
    "data.fold",
    "data.sound",
    "data.snr_db",
    "model.adapter.init_",
    "model.cls",
    "model.encoder.lora.alpha",
    "model.encoder.spec_augment",
    "model.end_of_audio",
    "model.lora.alpha",
    "model.lora.init_",
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
    "train.keep",
    "train.sampling",
    "train.schedule",
    "train.warmup",
    "train.weight_decay",
)
# Settings of which only the sign matters: whether they are 0.
SIGN_ONLY = (
    "tasks.",
    "train.losses.",
    "model.lora.dropout",
    "model.encoder.dropout",
    "model.encoder.lora.rank",
    "data.augment.noise_probability",
)
LARGEST_ONLY = ("model.lora.rank",)  # the largest value decides whether a trial fits, and the time hardly changes


@dataclass(frozen=True)
class TrialProfile:
    """Trials that take the same time and memory."""

    values: Values  # of the relevant axes
    config: ResolvedConfig  # of one such trial
    weight: float  # its share of all combinations

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.values.items()) or "all trials"


def trial_profiles(config: Config, all_values: bool = False) -> tuple[list[TrialProfile], int]:
    """Return the profiles of the trials that may start.

    Args:
        config: of the sweep.
        all_values: combine all numbers of a list; otherwise its smallest and its largest one, or only the largest one
            of LARGEST_ONLY.

    Returns:
        The profiles to measure, and the number of others: MAX_PROFILES are drawn at random if there are more.
    """
    points = config.search.points[: config.search.trials]
    if config.search.trials > len(points):
        space = config.search.space
        options = {key: _options(key, axis, all_values) for key, axis in space.items() if is_relevant(key)}
        drawn = representatives(config, options)
    else:
        drawn = [Candidate(draw(config, point), 1) for point in points]
    merged = () if all_values else LARGEST_ONLY
    groups: dict[str, list[Candidate]] = {}
    for candidate in drawn:
        relevant = {key: value for key, value in candidate.values.items() if is_relevant(key) and key not in merged}
        groups.setdefault(repr(sorted(relevant.items())), []).append(candidate)
    names = list(groups) if len(groups) <= MAX_PROFILES else random.Random(0).sample(list(groups), MAX_PROFILES)
    total = sum(candidate.weight for candidate in drawn)
    profiles = []
    for group in map(groups.__getitem__, names):
        values = max((member.values for member in group), key=_size)
        trial = resolve_candidate(config, values)
        if trial is not None:
            relevant = {key: value for key, value in values.items() if is_relevant(key)}
            profiles.append(TrialProfile(relevant, trial, sum(member.weight for member in group) / total))
    return profiles, len(groups) - len(names)


def _size(values: Values) -> list[float]:
    """Return the order of the trials of a profile; the largest one represents all."""
    return [value if _is_number(value := values.get(key)) else 0 for key in LARGEST_ONLY]


def is_relevant(key: str) -> bool:
    """Return whether a setting changes what a trial takes."""
    return not key.startswith(IRRELEVANT)


def matching_profiles(values: Mapping[str, Value], profiles: Sequence[Mapping[str, Value]]) -> list[int]:
    """Return the indices of the profiles that represent a trial.

    A profile matches if its values are equal to the trial's. A number that no profile has matches both its neighbours.

    Args:
        values: of the trial's axes, or of some of them.
        profiles: the values of each profile.
    """
    matching = list(range(len(profiles)))
    for key, value in values.items():
        if is_relevant(key):
            near = _neighbours(key, value, [profile[key] for profile in profiles if key in profile])
            matching = [index for index in matching if profiles[index].get(key, value) in (value, *near)]
    return matching


def _neighbours(key: str, value: Value, measured: Sequence[Value]) -> list[float]:
    """Return the measured values next to a number that was not measured."""
    if value in measured or not _is_number(value):
        return []
    numbers = [number for number in measured if _is_number(number)]
    if key.startswith(SIGN_ONLY):
        return [number for number in numbers if (number > 0) == (value > 0)]
    below = [number for number in numbers if number < value]
    above = [number for number in numbers if number > value]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _options(key: str, axis: Axis, all_values: bool) -> list[Value]:
    """Return the values of an axis that are worth telling apart."""
    values = axis.extremes()
    numbers = [value for value in values if _is_number(value)]
    if len(numbers) < len(values):
        return values
    if key.startswith(SIGN_ONLY):
        return axis.by_sign()
    if all_values:
        return [*sorted(numbers)]
    return [max(numbers)] if key in LARGEST_ONLY else list(dict.fromkeys((min(numbers), max(numbers))))
