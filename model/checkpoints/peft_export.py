"""Export a trained model to files that other programs read: LoRA as PEFT writes it, all other tensors that the base
models do not contain as safetensors, and the meaning of its answers as JSON.

lora/                 adapter_config.json and adapter_model.safetensors; absent without LoRA
speech.safetensors    adapter, learned vectors, and weights of the encoder or the LLM that were trained
labels.json           tasks with their labels, roles, corpus
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import reason
from data.loading.tasks import TASKS, AnswerSet
from model.checkpoints.audio_llms import audio_family, audio_llm_name, plain_llm_name
from model.checkpoints.checkpoint import CheckpointError, ParentLink
from model.checkpoints.fingerprint import BaseIdentity, digest
from model.compat import lora_parameter_names
from model.parts import part_of

LABELS, SPEECH, LORA = "labels.json", "speech.safetensors", "lora"
LORA_WEIGHTS = "adapter_model.safetensors"  # as PEFT names it
EXPORT_AGAIN = "export the trial again"


class Answers(BaseModel):
    """The labels of a task in order, and how often each occurs in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    labels: tuple[str, ...]  # none: the answer is a text
    counts: tuple[int, ...]  # model.priors=balanced divides by them


@dataclass(frozen=True)
class ExportSource:
    """The trial that is exported, and the corpus that it was trained on."""

    sweep: str
    trial: int | None  # None: it was trained alone
    corpus: str
    fingerprint: str  # of the corpus
    roles: Mapping[str, Sequence[str]]  # the labels of each role
    bases: Mapping[str, BaseIdentity] = field(default_factory=dict)  # the models that it was trained on, by setting


class Exported(BaseModel):
    """The content of labels.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    sweep: str  # these six as in `ExportSource`
    trial: int | None
    corpus: str
    fingerprint: str
    roles: dict[str, tuple[str, ...]]
    bases: dict[str, BaseIdentity] = {}  # earlier versions wrote none
    tasks: dict[str, Answers]
    meaning: dict[str, str]  # see `SpeechLLM.meaning`
    digest: str  # of all tensors

    @model_validator(mode="after")
    def _check_tasks(self) -> "Exported":
        for name, answers in self.tasks.items():
            if name not in TASKS:
                raise ValueError(f"{name!r} is no task")
            if not len(answers.labels) == len(answers.counts) == len(set(answers.labels)):
                raise ValueError(f"the labels of {name} must differ, and have a count each")
        return self

    def answer_sets(self) -> dict[str, AnswerSet]:
        """Return the possible answers of each task."""
        return {task: AnswerSet(answers.labels, answers.counts) for task, answers in self.tasks.items()}


class ExportedState(TypedDict):
    """The part of a checkpoint's content that an exported model has."""

    tensors: dict[str, Tensor]
    parents: list[ParentLink]  # none: the model contains what they trained
    digest: str
    meaning: dict[str, str]
    fingerprint: str
    bases: dict[str, dict[str, str | None]]


def is_exported(path: Path | str) -> bool:
    """Return whether a folder contains an exported model."""
    return (Path(path) / LABELS).is_file()


def exported_tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors that the base models do not contain: those that trained or came from earlier trials."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad or name in model.loaded
    }


def write(model: Any, folder: Path, source: ExportSource) -> None:
    """Write the model into a folder.

    Args:
        model: a SpeechLLM.
        folder: exists.
        source: of the model, for labels.json.
    """
    tensors = exported_tensors(model)
    lora = {name: tensor for name, tensor in tensors.items() if part_of(name) == "lora"}
    if lora:
        _write_lora(model, lora, folder / LORA)
    save_file({name: tensor for name, tensor in tensors.items() if name not in lora}, folder / SPEECH)
    answers = {task: Answers(labels=known.labels, counts=known.counts) for task, known in model.tasks.items()}
    labels = Exported(tasks=answers, meaning=model.meaning(), digest=digest(tensors), **vars(source))
    (folder / LABELS).write_text(labels.model_dump_json(indent=1), encoding="utf-8")


def _write_lora(model: Any, lora: dict[str, Tensor], folder: Path) -> None:
    """Write LoRA as `PeftModel.save_pretrained` does, which would add a README of its own and name the base model by
    the folder that it was loaded from on this machine.

    LoRA of an audio LLM is for the audio LLM: names of layers lead through its language model, and targets are a
    pattern that leaves out its encoder, whose layers may have the same names.
    """
    from peft import get_peft_model_state_dict

    state = {name.removeprefix("llm."): tensor for name, tensor in lora.items()}
    tensors = get_peft_model_state_dict(model.llm, state_dict=state, save_embedding_layers=False)
    config = copy.copy(model.llm.peft_config["default"])
    config.inference_mode, config.base_model_name_or_path = True, model.config.llm.path
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the file is the same in every process
    if audio_family(model.config.llm.path) is not None:
        tensors = {audio_llm_name(name): tensor for name, tensor in tensors.items()}
        if config.target_modules:
            config.target_modules = rf"(.*language_model.*\.)?({'|'.join(config.target_modules)})"
    config.save_pretrained(str(folder))
    save_file(tensors, folder / LORA_WEIGHTS)


def read(folder: Path) -> Exported:
    """Read labels.json.

    Raises:
        CheckpointError: the folder contains no exported model, or its labels.json is damaged.
    """
    path = folder / LABELS
    try:
        return Exported.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: no exported model (no {LABELS}); `sweep export` makes one") from None
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(map(str, detail["loc"])) or "file"
        raise CheckpointError(f"{path}: {field}: {detail['msg']}; {EXPORT_AGAIN}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); {EXPORT_AGAIN}") from None


def load_state(folder: Path) -> ExportedState:
    """Read an exported model as the checkpoint of a trial that started from no other.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    labels = read(folder)
    try:
        tensors = load_file(folder / SPEECH)
        if (folder / LORA).exists():
            lora = lora_parameter_names(load_file(folder / LORA / LORA_WEIGHTS))
            tensors |= {f"llm.{plain_llm_name(name)}": tensor for name, tensor in lora.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({reason(error)}); {EXPORT_AGAIN}") from None
    if digest(tensors) != labels.digest:
        raise CheckpointError(f"{folder}: its weights are not those that {LABELS} describes; {EXPORT_AGAIN}")
    return ExportedState(
        tensors=tensors,
        parents=[],
        digest=labels.digest,
        meaning=labels.meaning,
        fingerprint=labels.fingerprint,
        bases={setting: base.model_dump() for setting, base in labels.bases.items()},
    )
