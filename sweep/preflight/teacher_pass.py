"""Frozen passes of teachers: what a trial's distillation reads, and how that is computed; see `sweep.frozen`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import ConfigError, MisfitError
from data.loading import array_files as frozen
from data.loading.array_files import Part
from data.loading.tasks import Item
from data.loading.teacher_files import TeacherLogits, parts
from model.objectives.teacher import TOP, CacheKey, Job, lessons, recipe
from model.speech_llm.language_model import load_llm, max_positions
from model.speech_llm.prompt import PromptBuilder
from model.speech_llm.tokenizer import load_tokenizer
from sweep.config.resolve import ResolvedConfig
from sweep.execution.trial import open_shards
from sweep.preflight.encoder_pass import shown_name

# Axes that decide what a teacher reads and says, if any listens.
AXES = (
    "model.llm.path",
    "model.llm.dtype",
    "model.llm.max_text_tokens",
    "model.precision",
    "model.modality",
    "model.prompt.",
    "train.losses.distillation",
    "train.losses.hidden",
    "train.losses.temperature",
    "data.fold",
    "data.history",
    "data.last_text",
    "tasks.",
)
BYTES = 4 * (2 * TOP + 1)  # of a predicted token
COURSES = 8  # kept in memory: each holds the tokens of a whole training split
_READ: dict[tuple[str, ...], "TeacherInputs"] = {}


@dataclass(frozen=True)
class TeacherInputs:
    """What a teacher reads in a trial."""

    lessons: dict[Item, TeacherLogits]
    parts: list[Part[Item]]


@dataclass(frozen=True)
class CacheRequest:
    """What a teacher says, in files that trials of a sweep read."""

    recipe: CacheKey
    config: ResolvedConfig
    folder: Path
    course: TeacherInputs

    @property
    def parts(self) -> list[Part[Item]]:
        """The files it lies in."""
        return self.course.parts

    @property
    def missing(self) -> list[Part[Item]]:
        """Those that have not been computed."""
        return frozen.missing(self.folder, self.course.parts)

    def describe(self) -> str:
        """Whose it is."""
        warmth = "" if self.recipe.temperature == 1 else f" at temperature {self.recipe.temperature:g}"
        return f"teacher {shown_name(self.recipe.llm)}{warmth}"

    def shown(self, size: int) -> str:
        """Tokens as such."""
        return f"{size:,} tokens read"

    def work(self, size: int) -> float:
        """Tokens times parameters."""
        llm = load_llm(self.recipe.llm, self.recipe.dtype, "meta")
        return float(size) * float(sum(parameter.numel() for parameter in llm.parameters()))

    @property
    def epoch(self) -> int:
        """All of it: it is asked about the training split alone."""
        return sum(part.size for part in self.course.parts)

    def bytes(self, parts: Sequence[Part[Item]]) -> int:
        """At most: smaller vocabularies take less."""
        return BYTES * sum(self.course.lessons[item].predicted for part in parts for item in part.rows)

    @property
    def reading(self) -> tuple[str, ...]:
        """Nothing else has the same."""
        return self.recipe.key, *(part.name for part in self.parts)

    def jobs(self, parts: Sequence[Part[Item]], needs: Sequence["CacheRequest"]) -> list[Job]:
        """The work."""
        read, threads = self.course.lessons, self.config.resources.threads
        return [Job(part, [read[item] for item in part.rows], self.recipe, self.folder, threads) for part in parts]


def need_of(config: ResolvedConfig, cache: Path) -> CacheRequest | None:
    """What a trial may read in place of a teacher; None if it has none, or one whose hidden states it needs, too: they
    would take E numbers a token, and with the teacher at hand its words cost nothing."""
    losses = config.train.losses
    if config.storage.features == "live" or not losses.distillation or losses.hidden:
        return None
    try:
        course = _course(config)
    except (ConfigError, MisfitError):
        return None  # should it be drawn, the trial says so
    made = recipe(config.model, losses.temperature, config.resources.device)
    return CacheRequest(made, config, cache / "teacher" / made.key, course)


def _course(config: ResolvedConfig) -> TeacherInputs:
    tasks = config.tasks.active()
    read = {"llm", "prompt", "modality", "cls", "end_of_audio"}  # by the prompter
    key = (config.model.model_dump_json(include=read), config.data.model_dump_json(), *tasks)
    if key not in _READ:
        if len(_READ) >= COURSES:
            del _READ[next(iter(_READ))]
        llm, shards = config.model.llm, open_shards(config)
        prompter = PromptBuilder(load_tokenizer(llm.path), config.model)
        longest = max_positions(load_llm(llm.path, llm.dtype, "meta"))
        own = lessons(prompter, longest, shards, config.data, tasks)
        _READ[key] = TeacherInputs(own, parts(shards, own))
    return _READ[key]
