"""The trials that a search may draw: the one place that enumerates them, for checks, feature caches and dry runs.

An enumeration starts from options, the values of each axis that are worth telling apart, and combines them as the
search draws: an axis takes no value where its condition fails.
"""

import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from data.errors import ConfigError
from sweep.config.loader import flat
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.config.schema import Config
from sweep.config.space import FOLD, Axis, Value, Values, plain

STRUCTURE = ("model.", "tasks.", FOLD)  # axes that change what is built, or what it is built for
MOST = 1024  # combinations that are looked at; of more, as many are drawn at random
Options = Mapping[str, Sequence[Value]]  # values of axes that are combined, by dotted key


class Candidate(NamedTuple):
    """Values that a trial may have, on the axes that have options."""

    values: Values
    weight: int  # combinations of options that come to these values


def candidates(config: Config, options: Options, most: int = MOST) -> list[Candidate]:
    """Return all combinations of options that a trial may have, in the order of drawing.

    A condition on an axis without options may hold or not: there is a candidate for either.

    Args:
        config: of the sweep.
        options: an axis with an empty list is never enumerated, and neither are trials that draw it.
        most: candidates that are kept; the first ones.
    """
    search, base = config.search, flat(config)
    combined = [Candidate({}, 1)]
    for key in (key for key in search.order() if key in options):
        when, values = search.space[key].when, options[key]
        decided = {name: allowed for name, allowed in when.items() if name in options or name not in search.space}
        drawn: list[Values] = [{key: value} for value in values]
        if len(decided) < len(when):
            drawn = [{}, *drawn]
        extended = []
        for chosen, weight in combined:
            if all(chosen.get(name, plain(base.get(name))) in allowed for name, allowed in decided.items()):
                extended += [Candidate(chosen | value, weight) for value in drawn]
            else:
                extended.append(Candidate(chosen, weight * len(values)))
        combined = extended[:most]
    return combined


def representatives(config: Config, options: Options) -> list[Candidate]:
    """Return candidates that stand for the whole search: all combinations, or MOST random ones where there are more.

    Axes without options have their first value.
    """
    if math.prod(map(len, options.values())) > MOST:
        generator = random.Random(0)
        chosen = [{key: generator.choice(values) for key, values in options.items()} for _ in range(MOST)]
        return [Candidate(draw(config, values), 1) for values in chosen]
    found = candidates(config, {**_fixed(config, {}), **options})
    # In the order of the options, which is not that of drawing where a condition names a later axis.
    ranks = {(key, repr(value)): rank for key, values in options.items() for rank, value in enumerate(values)}

    def rank(candidate: Candidate) -> list[int]:
        values = candidate.values
        return [ranks[key, repr(values[key])] if key in values else 0 for key in options]

    return sorted(found, key=rank)


def draw(config: Config, wanted: Mapping[str, Value]) -> Values:
    """Return the values of a trial: the wanted ones where their conditions hold, and the first value of other axes."""
    [candidate] = candidates(config, _fixed(config, wanted))
    return candidate.values


def combinations(config: Config, fixed: Mapping[str, Value] | None = None) -> Iterator[Values | None]:
    """Yield the values of each trial that the search may draw; None in place of infinitely many.

    Args:
        config: of the sweep.
        fixed: values that the trial must have, such as those of a point.
    """
    search, base, wanted = config.search, flat(config), fixed or {}
    first = search.ancestors(wanted)  # so that values that cannot go together are found at once
    keys = sorted(search.order(), key=lambda key: key not in first)

    def extend(values: Values, position: int) -> Iterator[Values | None]:
        while position < len(keys) and not search.is_varied(keys[position], values, base):
            if keys[position] in wanted:
                return
            position += 1
        if position == len(keys):
            yield values
            return
        key = keys[position]
        options = [wanted[key]] if key in wanted else search.space[key].values()
        if options is None:
            # Its values lead nowhere if a wanted axis has a condition that cannot hold any more.
            for _ in extend({**values, key: search.space[key].inside()}, position + 1):
                yield None
                return
            return
        for value in options:
            yield from extend({**values, key: value}, position + 1)

    yield from extend({}, 0)


def untrained(
    config: Config, trained: Collection[str], most: int, fixed: Mapping[str, Value] | None = None
) -> list[Values] | None:
    """Return the first combinations that no trial has; None if there are infinitely many.

    Args:
        config: of the sweep.
        trained: what the trials so far are, see `SearchConfig.same`.
        most: combinations that are returned.
        fixed: see `combinations`.
    """
    left = list[Values]()
    for values in combinations(config, fixed):
        if values is None:
            return None
        if config.search.same(values) not in trained:
            left.append(values)
            if len(left) >= most:
                break
    return left


def resolve_candidate(config: Config, values: Mapping[str, Value]) -> ResolvedConfig | None:
    """Return the configuration of a trial with these values; None if they are allowed singly and not together."""
    try:
        return resolve(config.for_trial(values))
    except ConfigError:
        return None  # a trial that draws them reports it


def first_trial(config: Config) -> ResolvedConfig:
    """Return the configuration of one trial of the search: its first point, or the first value of every axis."""
    return resolve(config.for_trial(draw(config, next(iter(config.search.points), {}))))


def structures(config: Config) -> Iterator[Values]:
    """Yield values of the structural axes in trials that the search may draw.

    They are those of the points, and every value of each axis in turn, with the values that its conditions ask for.
    """
    space, seen = config.search.space, set[str]()
    each = (under_conditions(space, key, value) for key, axis in space.items() for value in axis.extremes())
    for wanted in itertools.chain([{}], config.search.points, each):
        structural = {key: value for key, value in draw(config, wanted).items() if key.startswith(STRUCTURE)}
        if repr(structural) not in seen:
            seen.add(repr(structural))
            yield structural


def _fixed(config: Config, wanted: Mapping[str, Value]) -> dict[str, Sequence[Value]]:
    """Return one option for each axis: the wanted value, or else the first or lowest one."""
    return {key: [wanted.get(key, axis.extremes()[0])] for key, axis in config.search.space.items()}


def under_conditions(space: Mapping[str, Axis], key: str, value: Value) -> Values:
    """Return a value of an axis, with values of other axes under which it is drawn, if there are such."""
    values: Values = {key: value}
    for name, allowed in space[key].when.items():
        possible = [choice for choice in allowed if name in space and space[name].contains(choice)]
        values |= under_conditions(space, name, possible[0]) if possible else {}
    return values
