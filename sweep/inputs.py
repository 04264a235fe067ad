"""What a sweep needs before it starts: corpus and models are looked at, and every structure that the search may ask for
is built without weights, so that a mistake is one line now and not a failed trial later."""

from collections.abc import Iterator, Mapping
from typing import Any

from data.errors import ConfigError, UserError
from data.tasks import answer_sets, has_sound
from model.evaluate import TrialData
from model.imbalance import with_numbers
from model.speech_llm import SpeechLLM
from sweep import builtin
from sweep.config import Config
from sweep.settings import flat
from sweep.space import FOLD, Axis
from sweep.trial import open_shards

STRUCTURE = ("model.", "tasks.", FOLD)  # axes that change what is built, or what it is built for


def resolve_inputs(config: Config) -> Config:
    """Make what is built in, and check the rest.

    Returns:
        The configuration with paths in place of built-in names.

    Raises:
        UserError: a shard is missing or corrupt, a split has nothing for a task, a label that there is not has a
            weight, an example does not fit, a model is not to be found or does not fit its settings, or the corpus has
            no sound and an axis wants it.
    """
    resolved = builtin.resolve(config)
    shards = open_shards(resolved.data)
    shards.verify()
    check_sound(resolved, has_sound(shards))
    measured = set()
    for values in _structures(resolved):
        try:
            changed = builtin.resolve(resolved.with_values(values | {"search.space": {}, "search.points": []}))
        except ConfigError:
            continue  # values that are allowed one by one and not together: should they be drawn, the trial says so
        model = skeleton(changed)
        with_numbers(changed.train, model.tasks)
        if (lengths := _lengths(changed)) not in measured:
            measured.add(lengths)
            own = open_shards(changed.data)
            TrialData.open(own, model, changed.data, ("train", "val"), teacher=changed.train.teaches)
    return resolved


def _lengths(config: Config) -> str:
    """The settings that decide how long an example is: others need not be measured anew."""
    lora = {"lora", "trainable", "init_from", "init_partial", "precision", "priors"}
    return repr((config.model.model_dump(exclude=lora), config.tasks.active(), config.data.fold))


def first_trial(config: Config) -> Config:
    """The configuration of a trial that the search may draw: its first point, or the first value of every axis."""
    points = config.search.points
    drawn = config.search.suggest(Chooser(points[0] if points else {}), flat(config))
    return builtin.resolve(config.with_values(drawn | {"search.space": {}, "search.points": []}))


def skeleton(config: Config) -> SpeechLLM:
    """The model of a configuration without its weights.

    Raises:
        UserError: see `SpeechLLM`.
    """
    shards = open_shards(config.data)
    return SpeechLLM(config.model, answer_sets(shards, config.tasks.active()), "meta")


def check_sound(config: Config, audible: bool) -> None:
    """Raise a UserError where a modality needs sound and the corpus has none."""
    axis = config.search.space.get("model.modality")
    wanted = [config.model.modality] if axis is None else axis.extremes()
    if any(modality != "text" for modality in wanted) and not audible:
        raise UserError(
            f"{config.data.shards}: model.modality {' / '.join(map(str, wanted))} needs sound and this corpus is text "
            "only; use --set model.modality=text, or prepare the corpus with --audio"
        )


def _structures(config: Config) -> Iterator[dict[str, Any]]:
    """Values of the structural axes in trials that the search may draw: the points, and every value of each axis in
    turn, with the values that its conditions ask for."""
    search = config.search
    wanted = [{}, *search.points]
    wanted += [_wanted(search.space, key, value) for key, axis in search.space.items() for value in axis.extremes()]
    seen = set()
    for values in wanted:
        drawn = search.suggest(Chooser(values), flat(config))
        structural = {key: value for key, value in drawn.items() if key.startswith(STRUCTURE)}
        if repr(structural) not in seen:
            seen.add(repr(structural))
            yield structural


def _wanted(space: Mapping[str, Axis], key: str, value: Any) -> dict[str, Any]:
    """A value of an axis, and values of other axes under which it is drawn, if there are such."""
    found = {key: value}
    for other, allowed in space[key].when.items():
        possible = [choice for choice in allowed if other in space and space[other].contains(choice)]
        found |= _wanted(space, other, possible[0]) if possible else {}
    return found


class Chooser:
    """A sampler that draws what is wanted, or else the first or lowest value."""

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        self.wanted = wanted

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.wanted.get(name, choices[0])

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        chosen: int = self.wanted.get(name, low)
        return chosen

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        chosen: float = self.wanted.get(name, low)
        return chosen
