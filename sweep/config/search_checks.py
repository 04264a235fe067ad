"""Check the axes and points of a search against the configuration."""

from collections.abc import Iterator
from difflib import get_close_matches

from pydantic import ValidationError

from data.config import TaskWeights
from sweep.config.loader import flat, problems_error, rule, with_value
from sweep.config.schema import Config
from sweep.config.space import FOLD, Value

SEARCHABLE = (
    "seed",
    FOLD,
    "data.history",
    "data.sound",
    "data.snr_db",
    "data.last_text",
    "data.augment.",
    "tasks.",
    "model.",
    "train.",
)


def check_search(config: Config, source: str) -> None:
    """Check the axes and points of a search against the configuration.

    Raises:
        ConfigError: lists every problem, each with the key, the value, the rule and what to do.
    """
    problems = list(_space_problems(config))
    if problems:
        raise problems_error(source, problems)


def _space_problems(config: Config) -> Iterator[str]:
    """Yield what is wrong with each axis, then with each point."""
    leaves = set(flat(config))
    for key, axis in config.search.space.items():
        where = f"search.space.{key}"
        if key not in leaves or not key.startswith(SEARCHABLE):
            near = get_close_matches(key, sorted(leaf for leaf in leaves if leaf.startswith(SEARCHABLE)), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{where}: no setting that a search may vary has this name{hint}"
            continue
        for condition in axis.when:
            if condition not in leaves:
                yield f"{where}.when.{condition}: no such setting"
        refused = [line for value in axis.extremes() for line in _refusals(config, key, value)]
        yield from refused or _refusals(config, key, axis.inside())
    yield from _sampler_problems(config)
    yield from _first_task_problems(config)
    if FOLD in config.search.space and (config.search.rule or config.search.trials > len(config.search.points)):
        yield (
            f"search.space.{FOLD}: a search would choose the easiest fold; set {FOLD}, and `sweep confirm --folds` "
            "trains the best on all of them"
        )
    for number, point in enumerate(config.search.points):
        for key, value in point.items():
            space = config.search.space.get(key)
            if space is None:
                yield f"search.points[{number}].{key}: not an axis of search.space; add the axis or remove the key"
            elif not space.contains(value):
                yield f"search.points[{number}].{key}: {value!r} lies outside its axis; {space.describe()}"


def _sampler_problems(config: Config) -> Iterator[str]:
    """Yield axes that the sampler cannot draw from."""
    search = config.search
    if search.sampler == "grid":
        for key, axis in search.space.items():
            if axis.values() is None:
                yield (
                    f"search.sampler: grid needs finite axes, and search.space.{key} has infinitely many values; give "
                    "it choices or a step, or choose another sampler"
                )
    if search.sampler == "cmaes":
        ranges = [key for key, axis in search.space.items() if axis.choices is None and len(axis.extremes()) > 1]
        if len(ranges) < 2:
            yield (
                "search.sampler: cmaes needs two axes that are ranges (low, high), and search.space has "
                f"{len(ranges)}; choose gp or tpe"
            )


def _first_task_problems(config: Config) -> Iterator[str]:
    """Yield axes with which metrics without a prefix would be of different tasks in different trials."""
    for key, axis in config.search.space.items():
        weights = [value for value in axis.extremes() if isinstance(value, int | float)]
        if not key.startswith("tasks.") or len(weights) < len(axis.extremes()):
            continue
        task, tasks = key.removeprefix("tasks."), config.tasks.model_dump()
        first = {next(iter(TaskWeights(**{**tasks, task: weight}).active()), None) for weight in weights if weight >= 0}
        if len(first) > 1:
            named = " or ".join(sorted(str(task) for task in first))
            yield (
                f"search.space.{key}: its values make {named} the first task, and metrics without a prefix are "
                "those of the first task, so trials could not be compared; leave 0 out, or search another task's weight"
            )


def _refusals(config: Config, key: str, value: Value) -> Iterator[str]:
    """Yield why the configuration would refuse a value of an axis."""
    tree = config.model_dump(exclude={"search": {"space", "points"}})
    try:
        changed = Config.model_validate(with_value(tree, key.split("."), value))
    except ValidationError as error:
        for detail in error.errors():
            yield f"search.space.{key}: the axis has {detail['input']!r}: {rule(detail)}"
        return
    # Rules over several settings are checked here only if no other axis could make them hold.
    if len(config.search.space) == 1:
        for problem in changed.problems():
            yield f"search.space.{key}: {problem}"
