"""The trials that a search may draw."""

from collections.abc import Iterator, Mapping
from typing import Any

from sweep.config import resolve as builtin
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.space import FOLD, Axis

STRUCTURE = ("model.", "tasks.", FOLD)  # axes that change what is built, or what it is built for


def first_trial(config: Config) -> Config:
    """The configuration of a trial that the search may draw: its first point, or the first value of every axis."""
    points = config.search.points
    drawn = config.search.suggest(FixedSampler(points[0] if points else {}), flat(config))
    return builtin.resolve(config.with_values(drawn | {"search.space": {}, "search.points": []}))


def _structures(config: Config) -> Iterator[dict[str, Any]]:
    """Values of the structural axes in trials that the search may draw: the points, and every value of each axis in
    turn, with the values that its conditions ask for."""
    search = config.search
    wanted = [{}, *search.points]
    wanted += [_wanted(search.space, key, value) for key, axis in search.space.items() for value in axis.extremes()]
    seen = set()
    for values in wanted:
        drawn = search.suggest(FixedSampler(values), flat(config))
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


class FixedSampler:
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
