"""The configuration of a sweep: one typed tree. `sweep.config.files.load` reads it from YAML."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from data.config import DataConfig, Section, TaskWeights
from data.loading.tasks import TASKS
from data.shards.store import credentials_message
from model.config import Count, ModelConfig, TrainConfig
from sweep.config.loader import flat, problems_error, validate, with_value
from sweep.config.search import LEAST_EPOCHS, SearchConfig
from sweep.config.space import EPOCHS, SEED, Axis

LABEL_METRICS = ("macro_f1", "accuracy", "weighted_f1", "loss", "ece")
COST_OBJECTIVES = ("gpu_seconds", "seconds", "steps")  # objectives beside the metrics of the tasks
TEXT_METRICS = ("loss", "perplexity", "bleu", "rouge_l")


class ResourceConfig(Section):
    """The resources of a trial, and how many trials run at a time."""

    workers: Count = Field(1, description="Workers per trial; without dropout, results do not depend on it.")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(
        1, description="CPUs per worker; a worker uses as many threads, rounded down."
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0, description="GPUs per worker; may be a fraction.")
    shard: bool = Field(
        False,
        description="Whether the workers of a trial divide the frozen weights of the LLM's layers among them (FSDP2), "
        "for an LLM that does not fit on one device.",
    )
    slots: Count | None = Field(None, description="Trials at a time; null: as many as the cluster has room for.")

    @property
    def threads(self) -> int:
        """Number of threads of a worker."""
        return max(1, int(self.cpus_per_worker))

    @property
    def device(self) -> str:
        """Device of a worker. A worker without a GPU may still see those of others, and must not use them."""
        return "cuda" if self.gpus_per_worker > 0 else "cpu"


class StorageConfig(Section):
    """Where a sweep keeps its study, its checkpoints and its feature cache."""

    ledger: str | None = Field(
        None,
        description="Where the study is stored. null: a journal file in the sweep's folder, on one machine or on a "
        "shared file system. Or a database: sqlite:///file (relative to the sweep's folder) or "
        "postgresql://user@host/database, which sweeps may share; its password comes from $PGPASSWORD or ~/.pgpass.",
    )
    keep: Count | None = Field(
        3,
        description="Checkpoints to keep of ended trials, the best ones; null: all. Running trials keep theirs.",
    )

    mirror: str | None = Field(
        None,
        description="URL (s3://bucket/path, gs://…) of a copy of the sweep's folder, from which another machine can "
        "resume; null: none. Credentials come from the environment.",
    )

    features: Literal["cached", "live"] = Field(
        "cached",
        description="Outputs of frozen encoders and layers, and of a distillation's teacher. cached: computed once "
        "before the trials start, and kept in storage.cache. live: computed by every trial, with the same result.",
    )
    cache: str | None = Field(
        None,
        description="Folder of the feature cache, which sweeps share and all nodes can read; relative to the parent of "
        "the sweep's folder. null: `cache` there.",
    )

    def problems(self) -> list[str]:
        """Return broken rules, as in ModelConfig. A validator would show the value, and with it a password."""
        return [*self._ledger_problems(), *self._mirror_problems()]

    def _mirror_problems(self) -> list[str]:
        if self.mirror is None:
            return []
        if problem := credentials_message(self.mirror):
            return [f"storage.mirror: {problem}"]
        if "://" not in self.mirror or self.mirror.startswith("file:"):
            return [f"storage.mirror: {self.mirror!r} is not the URL of a store; write s3://bucket/path, or null"]
        if self.ledger is not None and self.ledger.startswith("sqlite"):
            return ["storage.mirror: a SQLite database is not copied; use postgresql://…, or storage.ledger=null"]
        return []

    def _ledger_problems(self) -> list[str]:
        if self.ledger is None:
            return []
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        wanted = "write sqlite:///file or postgresql://user@host/database, or null for a file in the sweep's folder"
        try:
            url = make_url(self.ledger)
        except (ArgumentError, ValueError):
            return [f"storage.ledger: not a URL; {wanted}"]
        if url.password or any("password" in name for name in url.query):
            return [
                "storage.ledger: contains a password, which would be written to files; remove it, and pass it in "
                "$PGPASSWORD or ~/.pgpass"
            ]
        if url.get_backend_name() not in ("sqlite", "postgresql") or url.database in (None, "", ":memory:"):
            return [f"storage.ledger: {self.ledger!r} is not a database for a study; {wanted}"]
        return []


class Config(Section):
    """All settings of a sweep; `search.space` varies them from trial to trial."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        ..., description="Name of the sweep, of its folder under runs/ and of its MLflow experiment."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of initialisation, batches and search.")
    data: DataConfig = DataConfig()
    tasks: TaskWeights = TaskWeights()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    resources: ResourceConfig = ResourceConfig()
    storage: StorageConfig = StorageConfig()

    def problems(self) -> list[str]:
        """Return broken rules over several settings, each as a line with the key, the value, the rule and the fix."""
        problems = self.model.problems() + self.train.problems() + self.storage.problems()
        if problem := credentials_message(self.data.shards):
            problems.append(f"data.shards: {problem}")
        tasks = self.tasks.active()
        if not tasks:
            return [*problems, "tasks: all weights are 0, so nothing would be trained; raise one"]
        if self.train.labels == "votes" and all(TASKS[task].answer != "label" for task in tasks):
            problems.append(
                f"train.labels: votes is for tasks that predict codes, and {', '.join(tasks)} "
                f"{'do' if len(tasks) > 1 else 'does'} not; set majority, or give such a task a weight"
            )
        problems += self._sharding_problems()
        if self.model.llm.attention == "flash_attention_2" and self.resources.device == "cpu":
            problems.append(
                "model.llm.attention: flash_attention_2 needs a GPU, and resources.gpus_per_worker is 0; set auto, or "
                "give workers a GPU"
            )
        if self.search.budget and self.search.budget.gpu_hours and not self.resources.gpus_per_worker:
            problems.append(
                f"search.budget.gpu_hours: {self.search.budget.gpu_hours}, and trials use no GPU "
                "(resources.gpus_per_worker is 0); set hours, steps or trials"
            )
        if self.search.stop_when == "noise" and self.train.epochs < LEAST_EPOCHS:
            problems.append(
                f"search.stop_when: noise is read from {LEAST_EPOCHS} epochs or more, and train.epochs is "
                f"{self.train.epochs}; set stop_when to null, or a budget"
            )
        if self.search.tie_share and SEED in self.search.space:
            problems.append(
                f"search.tie_share: {self.search.tie_share:g} is for further seeds, and seed is an axis of "
                "search.space; leave one out"
            )
        if self.search.fidelity == "data":
            problems += self._share_problems()
        metrics = metric_names(tasks)
        problems += self._objective_problems(metrics)
        if self.search.metric not in metrics:
            problems.append(
                f"search.metric: {self.search.metric!r} is not a metric of the task{'s'[: len(tasks) - 1]} "
                f"{', '.join(tasks)}; choose from {', '.join(metrics)}"
            )
        return problems

    def _share_problems(self) -> list[str]:
        """Return what does not go with trials that are compared on shares of the data."""
        search, train, space = self.search, self.train, self.search.space
        broken = {
            "search.pruning": search.rule is None and "null, so that nothing is compared; set kind: promote",
            "search.pruning.first_epoch": bool(search.rule and search.rule.first_epoch) and "set; leave it out",
            "search.stop_when": search.stop_when is not None and "set; set a budget instead",
            "search.tie_share": search.tie_share > 0
            and "above 0; set it to 0, and confirm the best with `sweep confirm`",
            "train.patience": (train.patience is not None or "train.patience" in space) and "set; set it to null",
            "train.keep": (train.keep == "best" or "train.keep" in space) and "best; set it to last",
            EPOCHS: EPOCHS in space and "an axis; set a number",
        }
        rule = "search.fidelity: data compares trials after the last epoch on each share, and"
        return [f"{rule} {key} is {problem}" for key, problem in broken.items() if problem]

    def _sharding_problems(self) -> list[str]:
        if not self.resources.shard:
            return []
        problems = []
        if self.resources.workers == 1:
            problems.append(
                "resources.shard: true divides weights among the workers of a trial, and resources.workers is 1; raise "
                "it, or set resources.shard=false"
            )
        if self.model.llm.load_in != "none":
            problems.append(
                "resources.shard: true divides weights that are not quantized, and model.llm.load_in is "
                f"{self.model.llm.load_in}; set it to none, or resources.shard=false, with the whole LLM on each worker"
            )
        if self.train.compile == "on":
            problems.append(
                "resources.shard: true gathers a layer's weights before it computes, and train.compile=on compiles it "
                "with them; set train.compile=off, or resources.shard=false"
            )
        if self.train.has_teacher:
            problems.append(
                "resources.shard: true divides the LLM, and the teacher of train.losses.distillation and "
                "train.losses.hidden is a whole one; set both to 0, or resources.shard=false"
            )
        return problems

    def _objective_problems(self, metrics: Sequence[str]) -> list[str]:
        """Return what is wrong with several objectives; `metrics` are those of the tasks."""
        search = self.search
        if search.metrics is None:
            return []
        if len(set(search.metrics)) < max(2, len(search.metrics)):
            return ["search.metrics: name two or more different objectives, or set it to null"]
        if search.metrics[0] != search.metric:
            first = search.metrics[0]
            return [f"search.metrics: begins with {first!r}, and search.metric is {search.metric!r}; leave one out"]
        known = [*metrics, *COST_OBJECTIVES]
        problems = [
            f"search.metrics: {name!r} is no objective; choose from {', '.join(known)}"
            for name in search.metrics[1:]
            if name not in known
        ]
        if "gpu_seconds" in search.metrics and not self.resources.gpus_per_worker:
            problems.append(
                "search.metrics: gpu_seconds, and trials use no GPU (resources.gpus_per_worker is 0); use seconds"
            )
        if search.rule is not None:
            problems.append(
                "search.pruning: several objectives are not pruned; set it to null, or leave search.metrics out"
            )
        if search.tie_share:
            problems.append(
                f"search.tie_share: {search.tie_share:g}, and ties are those of one objective; set it to 0, or leave "
                "search.metrics out"
            )
        if search.sampler in ("gp", "cmaes"):
            problems.append(
                f"search.sampler: {search.sampler} knows one objective, and search.metrics has {len(search.metrics)}; "
                "choose tpe, qmc, random or grid"
            )
        return problems

    def with_values(self, values: Mapping[str, object]) -> "Config":
        """Return a validated copy with the values of dotted keys replaced.

        Raises:
            ConfigError: a key is unknown or a value breaks a rule.
        """
        tree = self.model_dump()
        for key, value in values.items():
            tree = with_value(tree, split_key(key), value)
        return parse(tree, "trial")

    def for_trial(self, values: Mapping[str, object]) -> "Config":
        """Return the configuration that reproduces one trial by itself: its values in place, and no search.

        Raises:
            ConfigError: values are allowed singly and not together.
        """
        return self.with_values({**values, "search.space": {}, "search.points": []})


DEFAULTS = flat(Config(name="defaults"))  # every setting by its dotted key, except for those of sections that are null
AXES = "search.space."


def split_key(key: str) -> list[str]:
    """Return the path of a dotted key in the tree: the name of an axis has dots, and so have those of its conditions.

    >>> split_key("search.space.train.learning_rate.low")
    ['search', 'space', 'train.learning_rate', 'low']
    """
    if not key.startswith(AXES):
        return key.split(".")
    parts = key.removeprefix(AXES).split(".")
    ends = [end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in DEFAULTS]
    # Of an unknown setting, all is the name but for a last part that an axis has, so that the error shows the name.
    end = ends[0] if ends else len(parts) - (parts[-1] in Axis.model_fields and len(parts) > 1)
    name, field = ".".join(parts[:end]), parts[end:]
    condition = [field[0], ".".join(field[1:])] if field[:1] == ["when"] and len(field) > 1 else field
    return ["search", "space", name, *condition]


def metric_names(tasks: Sequence[str]) -> list[str]:
    """Return the metrics that a search may optimize; those of the first task have no prefix."""
    names = ["total_loss"] if len(tasks) > 1 else []
    for index, task in enumerate(tasks):
        metrics = TEXT_METRICS if TASKS[task].answer == "text" else LABEL_METRICS
        names += [name if index == 0 else f"{task}/{name}" for name in metrics]
    return names


def parse(tree: Mapping[str, object], source: str) -> Config:
    """Return a tree of plain values as a validated configuration, with the objective that fits its tasks.

    Raises:
        ConfigError: lists every problem, each with the key, the value, the rule and what to do.
    """
    config = validate(Config, tree, source)
    tasks, search = config.tasks.active(), config.search
    if search.metrics:  # pruning compares trials by one objective, and is on by default
        left_out = {"metric": search.metrics[0], "pruning": None}
        filled = {name: value for name, value in left_out.items() if name not in search.model_fields_set}
        config = config.model_copy(update={"search": search.model_copy(update=filled)})
    elif tasks and "metric" not in config.search.model_fields_set:
        chosen = "macro_f1" if "macro_f1" in metric_names(tasks) else "loss"
        config = config.model_copy(update={"search": config.search.model_copy(update={"metric": chosen})})
    problems = config.problems()
    if problems:
        raise problems_error(source, problems)
    return config
