"""The second kind of the feature cache: logits of the teachers of distillations."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.errors import ConfigError, MisfitError
from data.loading.cached_arrays import CacheFile
from data.loading.tasks import Item
from data.loading.teacher_files import TeacherInput, teacher_files
from model.objectives.teacher import TOP, TeacherJob, TeacherKey, teacher_inputs, teacher_key
from model.runtime.memory import folder_stamp
from model.speech_llm.language_model import load_base, load_llm, max_positions
from model.speech_llm.prompt import PromptBuilder
from model.speech_llm.tokenizer import load_tokenizer
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.execution.trial import open_shards
from sweep.preflight.cache_kinds.base import CacheKind, CacheRequest, model_name

BYTES_PER_TOKEN = 4 * (2 * TOP + 1)  # for a predicted token
MAX_INPUTS = 8  # in memory at once: each holds the tokens of a whole training split
TeacherRequest = CacheRequest[Item, TeacherKey]


class TeacherInputs(NamedTuple):
    """What a teacher reads in a trial."""

    inputs: dict[Item, TeacherInput]
    files: list[CacheFile[Item]]


_inputs: dict[tuple[str, ...], TeacherInputs] = {}  # by the settings that they depend on


class TeacherLogitsKind(CacheKind[Item, TeacherKey]):
    """Logits of teachers; a row is an item of the training split, and sizes are tokens that the teacher reads."""

    name = "teacher"
    axes = (
        "model.llm.path",
        "model.llm.dtype",
        "model.llm.load_in",
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

    def keys(self, config: ResolvedConfig) -> list[TeacherKey]:
        """Return the key of the logits that a trial may read in place of running a teacher.

        None if the trial has no teacher, or if it also needs the teacher's hidden states: they would take E numbers a
        token, and a teacher that runs for its hidden states gives its logits for free.
        """
        losses = config.train.losses
        if config.storage.features == "live" or not losses.distillation or losses.hidden:
            return []
        try:
            _teacher_inputs(config)
        except (ConfigError, MisfitError):
            return []  # such a trial fails with this error if it is drawn
        return [teacher_key(config.model, losses.temperature, config.resources.device)]

    def files(self, config: ResolvedConfig, folder: Path, sweep: Config | None) -> list[CacheFile[Item]]:
        """Return the files of the training split."""
        return _teacher_inputs(config).files

    def pass_key(self, request: TeacherRequest) -> str:
        """Return a string that is different for all requests."""
        return " ".join([request.key.key, *(file.name for file in request.files)])

    def jobs(self, requests: Sequence[TeacherRequest], files: Sequence[CacheFile[Item]]) -> list[TeacherJob]:
        """Return a job for each file."""
        [request] = requests
        inputs, threads = _teacher_inputs(request.config).inputs, request.config.resources.threads
        keys = {request.folder: request.key}
        return [TeacherJob(file, keys, threads, {item: inputs[item] for item in file.rows}) for file in files]

    def work(self, request: TeacherRequest, size: int) -> float:
        """Return tokens times parameters."""
        llm = load_llm(request.key.llm, request.key.dtype, "meta")
        return float(size) * float(sum(parameter.numel() for parameter in llm.parameters()))

    def epoch_size(self, request: TeacherRequest) -> int:
        """Return all tokens: the teacher reads the training split only."""
        return sum(file.size for file in request.files)

    def bytes(self, request: TeacherRequest, files: Sequence[CacheFile[Item]]) -> int:
        """Return an upper bound: vocabularies of less than TOP tokens need less."""
        inputs = _teacher_inputs(request.config).inputs
        return BYTES_PER_TOKEN * sum(inputs[item].predicted for file in files for item in file.rows)

    def describe(self, keys: Sequence[TeacherKey], config: ResolvedConfig) -> str:
        """Return the teacher and its temperature."""
        [key] = keys
        temperature = "" if key.temperature == 1 else f" at temperature {key.temperature:g}"
        return f"teacher logits of {model_name(key.llm)}{temperature}"

    def format_size(self, size: int) -> str:
        """Return the number of tokens."""
        return f"{size:,} tokens"


def _teacher_inputs(config: ResolvedConfig) -> TeacherInputs:
    """Return what the teacher reads in a trial, for the settings used last from memory.

    Raises:
        ConfigError: the prompt does not fit the tokenizer.
        MisfitError: an input is too long.
    """
    tasks = config.tasks.active()
    fields = {"llm", "prompt", "modality", "cls", "end_of_audio"}  # that a prompt depends on
    name = (config.model.model_dump_json(include=fields), config.data.model_dump_json(), *tasks)
    name = (*name, str(folder_stamp(config.model.llm.path)))
    if name not in _inputs:
        if len(_inputs) >= MAX_INPUTS:
            del _inputs[next(iter(_inputs))]
        llm, shards = config.model.llm, open_shards(config)
        builder = PromptBuilder(load_tokenizer(llm.path), config.model)
        limit = max_positions(load_base(llm, "meta"))
        inputs = teacher_inputs(builder, limit, shards, config.data, tasks)
        _inputs[name] = TeacherInputs(inputs, teacher_files(shards, inputs))
    return _inputs[name]
