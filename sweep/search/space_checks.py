"""What a search asks for and no trial would do: refused before a sweep starts, or named in a line.

The rules of one axis or point by itself are in `sweep.config.search_checks`, which reads old sweeps, too. These rules
need the trials that a search may draw. A sweep that was started with such settings may be resumed with them.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from data.errors import ConfigError
from data.formats import format_count, format_list
from sweep.config.files import load
from sweep.config.loader import flat, problems_error, rule, with_value
from sweep.config.schema import Config
from sweep.config.space import Axis, Value, Values, plain
from sweep.search.candidates import candidates, combinations, under_conditions, untrained
from sweep.search.sampling.samplers import check_sampler
from sweep.search.stopping import MOST_COUNTED, total_trials

MOST_TRIED = 200  # trials that are validated until one accepts a value


def check_requests(config: Config, folder: Path) -> None:
    """Refuse a search that asks for what no trial would do.

    Args:
        config: of the sweep.
        folder: of the sweep; what a started sweep asked for already is accepted.

    Raises:
        ConfigError: lists every problem, each with the key, the value, the rule and what to do.
        UserError: the sampler needs a package that is not installed.
    """
    check_sampler(config)
    problems = list(refusals(config))
    path = folder / "config.yaml"
    if problems and path.exists():
        accepted = set(refusals(load(str(path))))
        problems = [problem for problem in problems if problem not in accepted]
    if problems:
        raise problems_error(config.name, problems)


def refusals(config: Config) -> Iterator[str]:
    """Yield what no trial would do, each with the key, the value, the rule and what to do."""
    yield from _point_refusals(config)
    if config.search.trials <= len(config.search.points):
        return  # nothing is drawn from the axes
    for key, axis in config.search.space.items():
        where = f"search.space.{key}"
        if axis.step is not None and axis.low == axis.last:
            yield (
                f"{where}.step: {axis.step} is larger than the range from {axis.low} to {axis.high}, so only "
                f"{axis.low} would be drawn; lower the step, or set {key} to {axis.low}"
            )
        for name, allowed in axis.when.items():
            for value in allowed:
                if problem := _invalid(config, name, value):
                    yield f"{where}.when.{name}: {value!r} is no value of {name}: {problem}; correct it"
        yield from _repeated_choices(config, key, axis)
        yield from _unusable_values(config, key, axis)


def _point_refusals(config: Config) -> Iterator[str]:
    """Yield points that are equal, points with values that would be dropped, and values that do not go together."""
    first: dict[str, int] = {}
    for number, point in enumerate(config.search.points):
        where = f"search.points[{number}]"
        dropped = list(_dropped_values(config, point))
        yield from (f"{where}.{problem}" for problem in dropped)
        if dropped:
            continue
        if (trial := _only_trial(config, point)) is not None:
            same = config.search.same(trial)
            if same in first:
                yield (
                    f"{where}: {trial} are the values of search.points[{first[same]}], and nothing is trained twice; "
                    "remove one of them, or vary `seed` to repeat a trial"
                )
            first.setdefault(same, number)
        if problem := _problem_of_all(config, _completions(config, point)):
            yield f"{where}: no trial can use {dict(point)}: {problem}"


def _only_trial(config: Config, point: Mapping[str, Value]) -> Values | None:
    """Return the values of the only trial that a point stands for; None if axes are left to be drawn."""
    left = untrained(config, (), 2, point)
    return left[0] if left is not None and len(left) == 1 else None


def _dropped_values(config: Config, point: Mapping[str, Value]) -> Iterator[str]:
    """Yield the values of a point that its trial cannot have, because their condition does not hold."""
    space, base = config.search.space, flat(config)
    if next(combinations(config, point), "nothing") != "nothing":
        return
    for key in point:
        conditions = space[key].when
        ancestors = {name: value for name, value in point.items() if name in config.search.ancestors([key])}
        if next(combinations(config, ancestors), "nothing") != "nothing":
            continue
        for name, allowed in conditions.items():
            value = point.get(name, plain(base[name]))
            if value not in allowed and (name in point or name not in space):
                yield (
                    f"{key}: {point[key]!r} would not be used, because {name} is {value!r} and the axis is varied only "
                    f"where it is {_one_of(allowed)}; remove the value, or change {name}"
                )
                break
        else:
            yield (
                f"{key}: {point[key]!r} would not be used, because the conditions of {', '.join(conditions) or key} "
                "cannot hold with the other values; remove the value, or change those"
            )


def _repeated_choices(config: Config, key: str, axis: Axis) -> Iterator[str]:
    """Yield choices that are written differently and are the same setting, such as 8 and "8"."""
    first: dict[str, Value] = {}
    for choice in axis.choices or []:
        try:
            changed = Config.model_validate(with_value(_without_search(config), key.split("."), choice))
        except ValidationError:
            continue  # refused elsewhere
        setting = repr(plain(flat(changed)[key]))
        if setting in first:
            yield (
                f"search.space.{key}: {first[setting]!r} and {choice!r} are the same setting, and nothing is trained "
                "twice; remove one of them"
            )
        first.setdefault(setting, choice)


def _unusable_values(config: Config, key: str, axis: Axis) -> Iterator[str]:
    """Yield values of an axis that go with no values of the other axes."""
    for value in axis.extremes():
        if problem := _problem_of_all(config, _completions(config, {key: value})):
            yield f"search.space.{key}: no trial can use {value!r}: {problem}"


def _completions(config: Config, values: Mapping[str, Value]) -> Iterator[Values]:
    """Yield trials with some values: first the one with the first values of other axes, then others."""
    wanted = dict(values)
    for key in values:
        wanted = under_conditions(config.search.space, key, values[key]) | wanted
    options = {key: [wanted.get(key, axis.extremes()[0])] for key, axis in config.search.space.items()}
    every = {key: [values[key]] if key in values else axis.extremes() for key, axis in config.search.space.items()}
    for candidate in itertools.chain(candidates(config, options), candidates(config, every)):
        if values.items() <= candidate.values.items():
            yield candidate.values


def _problem_of_all(config: Config, trials: Iterator[Values]) -> str | None:
    """Return why the configuration refuses the first of some trials, if it refuses all of them."""
    first = None
    for values in itertools.islice(trials, MOST_TRIED):
        try:
            config.for_trial(values)
        except ConfigError as error:
            first = first or "; ".join(line.removeprefix("  - ") for line in str(error).splitlines()[1:])
        else:
            return None
    return first


def _invalid(config: Config, key: str, value: Value) -> str | None:
    """Return why a setting cannot have a value, if it cannot."""
    try:
        Config.model_validate(with_value(_without_search(config), key.split("."), value))
    except ValidationError as error:
        return rule(error.errors()[0])
    return None


def _without_search(config: Config) -> dict[str, object]:
    return config.model_dump(exclude={"search": {"space", "points"}})


def notes(config: Config) -> Iterator[str]:
    """Yield what a search asks for and a sweep does only in part, each with the key, the value and what to do."""
    search, base = config.search, flat(config)
    points, trials = search.points, search.trials
    if len(points) > trials:
        yield (
            f"search.points: {format_count(len(points), 'point')}, and search.trials is {trials}, so those "
            f"from search.points[{trials}] on do not run; set search.trials to {len(points)} to run them all"
        )
    for number, point in enumerate(points):
        if point in points[:number] and _only_trial(config, point) is None:
            yield (
                f"search.points[{number}]: equal to search.points[{points.index(point)}]; both run, and the axes that "
                "they leave out are drawn differently"
            )
    if trials > len(points):
        for key, axis in search.space.items():
            if next(combinations(config, {key: axis.inside()}), "no") == "no":
                conditions = [
                    f"{name} is {plain(base.get(name))!r}, not {_one_of(allowed)}"
                    for name, allowed in axis.when.items()
                    if name not in search.space
                ] or [f"{name} is never {_one_of(allowed)}" for name, allowed in axis.when.items()]
                yield (
                    f"search.space.{key}: never varied, because {' and '.join(conditions)}; change that, or "
                    "remove the axis"
                )
            elif axis.step is not None and axis.low != axis.last and not axis.contains(axis.high):
                yield (
                    f"search.space.{key}.high: {axis.high} is not on the steps of {axis.step} from {axis.low}, so the "
                    f"largest value is {axis.last}; set high to it, or change the step"
                )
        total = total_trials(config, [])
        if total < trials:
            yield (
                f"search.trials: {trials}, and search.space has {format_count(total, 'different trial')}, after which "
                f"the sweep ends, since nothing is trained twice; widen search.space, or set search.trials to {total}"
            )
    yield from _sampler_notes(config)
    pruning = search.rule
    if pruning is not None and pruning.first_epoch is not None and not search.rungs(config.train.epochs):
        yield (
            f"search.pruning.first_epoch: {pruning.first_epoch} is not before the last epoch, so no trial is pruned; "
            "lower it, or set search.pruning to null"
        )


def _sampler_notes(config: Config) -> Iterator[str]:
    search = config.search
    if search.sampler == "grid":
        size = len(untrained(config, (), MOST_COUNTED) or ())
        if search.trials < size < MOST_COUNTED:
            yield (
                f"search.trials: {search.trials}, and the grid has {size} combinations, of which as many are chosen at "
                f"random; set search.trials to {size} to run them all"
            )
    if search.sampler == "cmaes":
        listed = [key for key, axis in search.space.items() if axis.choices is not None]
        if listed:
            yield (
                f"search.sampler: cmaes learns ranges only and draws {format_list(listed)} at random; tpe and gp learn "
                "lists of choices, too"
            )


def _one_of(allowed: list[Value]) -> str:
    return " or ".join(map(repr, allowed))
