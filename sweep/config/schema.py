"""The configuration of a sweep: one typed tree, read from YAML and dotted overrides; all its problems in one error."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from data.config import DataConfig, Section, TaskWeights
from data.loading.tasks import TASKS
from data.shards.store import credentials_message
from model.config import Count, ModelConfig, TrainConfig
from sweep.config.loader import problems_error, validate, with_value
from sweep.config.space import SearchConfig

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
        if said := credentials_message(self.mirror):
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
        if said := credentials_message(self.data.shards):
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
            tree = with_value(tree, key.split("."), value)
        return parse(tree, "trial")

    def for_trial(self, values: Mapping[str, Any]) -> "Config":
        """Return the configuration that reproduces one trial by itself: its values in place, and no search.

        Raises:
            ConfigError: values are allowed singly and not together.
        """
        return self.with_values({**values, "search.space": {}, "search.points": []})


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
    config = validate(Config, tree, source)
    tasks = config.tasks.active()
    if tasks and "metric" not in config.search.model_fields_set:
        chosen = "macro_f1" if "macro_f1" in metric_names(tasks) else "loss"
        config = config.model_copy(update={"search": config.search.model_copy(update={"metric": chosen})})
    problems = config.problems()
    if problems:
        raise problems_error(source, problems)
    return config
