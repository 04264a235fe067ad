"""The configuration of a sweep: one typed tree, read from YAML and dotted overrides; all its problems in one error."""

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from data.config import DataConfig, Section, TaskWeights
from data.errors import ConfigError
from data.store import secret_in
from data.tasks import TASKS
from model.config import Count, ModelConfig, TrainConfig
from sweep.settings import flat, problems_error, read_tree, rule, validated
from sweep.space import FOLD, SearchConfig
from sweep.whole import write_file

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

LABEL_METRICS = ("macro_f1", "accuracy", "weighted_f1", "loss", "ece")
TEXT_METRICS = ("loss", "perplexity", "bleu", "rouge_l")


class ResourceConfig(Section):
    """What a trial occupies."""

    workers: Count = Field(1, description="Ray Train workers of a trial; without dropout the result is the same.")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1, description="CPUs of a worker; whole ones are threads.")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0, description="GPUs of a worker; may be a fraction.")
    slots: Count | None = Field(None, description="Trials at the same time; by default as many as the cluster holds.")

    @property
    def threads(self) -> int:
        """Of a worker."""
        return max(1, int(self.cpus_per_worker))

    @property
    def device(self) -> str:
        """Of a worker; one that asked for no GPU may see those of others."""
        return "cuda" if self.gpus_per_worker > 0 else "cpu"


class StorageConfig(Section):
    """Where a sweep keeps its ledger, and how many of its checkpoints."""

    ledger: str | None = Field(
        None,
        description="Where the ledger lies. null: a journal file in the sweep's folder, on one machine or on a file "
        "system that all machines share. Or a database: sqlite:///file (relative to the sweep's folder) or "
        "postgresql://user@host/database, which sweeps may share; its password comes from $PGPASSWORD or ~/.pgpass.",
    )
    keep: Count | None = Field(
        3, description="Checkpoints kept of ended trials, the best ones; null: all. Running trials keep theirs."
    )

    mirror: str | None = Field(
        None,
        description="URL of a store (s3://bucket/path, gs://…) that gets a copy of the sweep's folder, from which "
        "another machine goes on; null: none. Credentials come from the environment.",
    )

    features: Literal["cached", "live"] = Field(
        "cached",
        description="What a frozen encoder, or its frozen layers, make of the sound, and a distillation's teacher of "
        "the words. cached: computed once, before the trials start, and kept in storage.cache. live: by every trial "
        "anew, with the same result.",
    )
    cache: str | None = Field(
        None,
        description="Folder of what trials and sweeps share, seen by all nodes; relative to the one in which the "
        "sweep's own folder lies. null: `cache` there.",
    )

    def problems(self) -> list[str]:
        """As in ModelConfig. Not a validator: its message would show the value, and with it a password."""
        return [*self._ledger_problems(), *self._mirror_problems()]

    def _mirror_problems(self) -> list[str]:
        if self.mirror is None:
            return []
        if said := secret_in(self.mirror):
            return [f"storage.mirror: {said}"]
        if "://" not in self.mirror or self.mirror.startswith("file:"):
            return [f"storage.mirror: {self.mirror!r} is no store; write s3://bucket/path, or null"]
        if self.ledger is not None and self.ledger.startswith("sqlite"):
            return ["storage.mirror: a ledger in SQLite is not copied; use postgresql://…, or storage.ledger=null"]
        return []

    def _ledger_problems(self) -> list[str]:
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        if self.ledger is None:
            return []
        wanted = "write sqlite:///file or postgresql://user@host/database, or null for a file in the sweep's folder"
        try:
            url = make_url(self.ledger)
        except (ArgumentError, ValueError):
            return [f"storage.ledger: not a URL; {wanted}"]
        if url.password or any("password" in name for name in url.query):
            return [
                "storage.ledger: holds a password, which would be written to files; take it out, and give it in "
                "$PGPASSWORD or ~/.pgpass"
            ]
        if url.get_backend_name() not in ("sqlite", "postgresql") or url.database in (None, "", ":memory:"):
            return [f"storage.ledger: {self.ledger!r} is no database that a ledger can lie in; {wanted}"]
        return []


class Config(Section):
    """Everything that decides a sweep; `search.space` varies it from trial to trial."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        ..., description="Of the sweep: its folder under runs/ and its MLflow experiment."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Of initialisation, batch plan and search.")
    data: DataConfig = DataConfig()
    tasks: TaskWeights = TaskWeights()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    resources: ResourceConfig = ResourceConfig()
    storage: StorageConfig = StorageConfig()

    def problems(self) -> list[str]:
        """Rules that span several settings, each as a line that names the key, the value, the rule and the fix."""
        found = self.model.problems() + self.train.problems() + self.storage.problems()
        if said := secret_in(self.data.shards):
            found.append(f"data.shards: {said}")
        tasks = self.tasks.active()
        if not tasks:
            return [*found, "tasks: all weights are 0, so there is nothing to learn; raise one"]
        known = metric_names(tasks)
        if self.search.metric not in known:
            found.append(
                f"search.metric: {self.search.metric!r} is no metric of the task{'s'[: len(tasks) - 1]} "
                f"{', '.join(tasks)}; choose from {', '.join(known)}"
            )
        return found

    def with_values(self, values: Mapping[str, Any]) -> "Config":
        """A copy with dotted keys replaced, validated.

        Raises:
            ConfigError: a key is unknown or a value breaks a rule.
        """
        tree = self.model_dump()
        for key, value in values.items():
            *path, leaf = key.split(".")
            section = tree
            for name in path:
                section = section.setdefault(name, {})
            section[leaf] = value
        return parse(tree, "trial")


def metric_names(tasks: Sequence[str]) -> list[str]:
    """What a search over these tasks may go by; metrics of the first task have no prefix."""
    names = ["total_loss"] if len(tasks) > 1 else []
    for place, task in enumerate(tasks):
        own = TEXT_METRICS if TASKS[task].answer == "text" else LABEL_METRICS
        names += [name if place == 0 else f"{task}/{name}" for name in own]
    return names


def parse(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a tree of plain values.

    Raises:
        ConfigError: lists every problem, each with the key, the value, the rule and what to do.
    """
    config = validated(Config, tree, source)
    tasks = config.tasks.active()
    if tasks and "metric" not in config.search.model_fields_set:
        chosen = "macro_f1" if "macro_f1" in metric_names(tasks) else "loss"
        config = config.model_copy(update={"search": config.search.model_copy(update={"metric": chosen})})
    problems = config.problems()
    if problems:
        raise problems_error(source, problems)
    return config


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or a YAML file, apply `key=value` overrides, and check the whole, the search space included.

    Raises:
        ConfigError: the file is missing or not YAML, or lists every problem of its content.
    """
    path = _find(name)
    plain = read_tree(path, overrides)
    _fix_axes(plain, [override.partition("=")[0] for override in overrides])
    config = parse(plain, str(path))
    problems = list(_space_problems(config))
    if problems:
        raise problems_error(str(path), problems)
    return config


def _fix_axes(tree: Any, keys: Sequence[str]) -> None:
    """A setting that is given on the command line is no axis any more; points with another value of it fall away."""
    search: Any = tree.get("search") if isinstance(tree, dict) else None
    space: Any = search.get("space") if isinstance(search, dict) else None
    if not isinstance(space, dict):
        return
    for key in keys:
        if space.pop(key, None) is None or not isinstance(search.get("points"), list):
            continue
        value: Any = tree
        for name in key.split("."):
            value = value[name]
        points = [point for point in search["points"] if not isinstance(point, dict) or point.get(key, value) == value]
        search["points"] = [
            {name: own for name, own in point.items() if name != key} if isinstance(point, dict) else point
            for point in points
        ]


def presets() -> list[str]:
    """Names of the presets that ship with the project."""
    folder = resources.files("sweep") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def dump(config: Config) -> str:
    """The configuration as YAML that `load` reads back."""
    text: str = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)
    return text


def write(config: Config, path: Path) -> None:
    """Write the configuration as YAML, complete or not at all."""
    write_file(path, dump(config))


def claim_folder(config: Config, folder: Path) -> None:
    """Write the configuration into a new folder, or over that of a sweep which can take the changes.

    Raises:
        ConfigError: the folder belongs to other settings (see `sweep.changes`); nothing is written then.
    """
    from sweep.changes import compare

    path = folder / "config.yaml"
    if path.exists():
        changes = compare(load(str(path)), config)
        if changes.refused:
            raise ConfigError(changes.refusal(folder))
    folder.mkdir(parents=True, exist_ok=True)
    write(config, path)


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if name in presets():
        return Path(str(resources.files("sweep") / "presets" / f"{name}.yaml"))
    near = get_close_matches(name, presets(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name}: no such file, and no preset of that name (presets: {', '.join(presets())}){hint}")


def _space_problems(config: Config) -> Iterable[str]:
    """Axes that lie outside the configuration, or whose values it would refuse."""
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
        refused = [line for value in axis.extremes() for line in _refusals(config, where, {key: value})]
        yield from refused or _refusals(config, where, {key: axis.inside()})
    yield from _first_task_problems(config)
    if FOLD in config.search.space and (config.search.pruning or config.search.trials > len(config.search.points)):
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


def _first_task_problems(config: Config) -> Iterable[str]:
    """Axes under which metrics without a prefix would speak of different tasks in different trials."""
    for key, axis in config.search.space.items():
        if not key.startswith("tasks.") or any(not isinstance(value, int | float) for value in axis.extremes()):
            continue
        weights = config.tasks.model_dump()
        first = {
            next(iter(TaskWeights(**{**weights, key.removeprefix("tasks."): value}).active()), None)
            for value in axis.extremes()
            if value >= 0
        }
        if len(first) > 1:
            named = " or ".join(sorted(str(task) for task in first))
            yield (
                f"search.space.{key}: its values make {named} the first task, of which metrics without a prefix speak, "
                "so trials could not be compared; leave 0 out, or search another task's weight"
            )


def _refusals(config: Config, where: str, values: dict[str, Any]) -> Iterable[str]:
    tree = config.model_dump(exclude={"search": {"space", "points"}})
    for key, value in values.items():
        *path, leaf = key.split(".")
        section = tree
        for name in path:
            section = section[name]
        section[leaf] = value
    try:
        changed = Config.model_validate(tree)
    except ValidationError as error:
        for detail in error.errors():
            yield f"{where}: the axis holds {detail['input']!r}: {rule(detail)}"
        return
    # Rules over several settings are judged here only if no other axis could mend them.
    if len(config.search.space) == 1:
        for problem in changed.problems():
            yield f"{where}: {problem}"
