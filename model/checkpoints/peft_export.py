"""A trained model as files that other programs read: LoRA as PEFT has it, everything else that is not in the base
models as safetensors, and what its answers mean as JSON.

lora/                 adapter_config.json and adapter_model.safetensors; not there without LoRA
speech.safetensors    adapter, learned vectors, and weights of the encoder or the LLM that were trained
labels.json           tasks with their labels, roles, corpus
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import reason
from data.loading.tasks import TASKS, AnswerSet
from model.checkpoints.checkpoint import CheckpointError, digest
from model.parts import part_of

LABELS, SPEECH, LORA = "labels.json", "speech.safetensors", "lora"
LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT calls them
AGAIN = "export the trial again"
INNER = ".default"  # PEFT's name of the one adapter, which its files leave out


class Answers(BaseModel):
    """Of a task: its labels in order, and how often each occurs in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    labels: tuple[str, ...]  # none: the answer is a text
    counts: tuple[int, ...]  # model.priors=balanced divides by them


class Exported(BaseModel):
    """What labels.json holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    sweep: str
    trial: int | None  # None: it was trained alone
    corpus: str
    fingerprint: str  # of the corpus
    roles: dict[str, tuple[str, ...]]  # who may carry which label
    tasks: dict[str, Answers]
    meaning: dict[str, str]  # see SpeechLLM.meaning
    digest: str  # of all tensors

    @model_validator(mode="after")
    def _tasks_are_known(self) -> "Exported":
        for name, own in self.tasks.items():
            if name not in TASKS:
                raise ValueError(f"{name!r} is no task")
            if not len(own.labels) == len(own.counts) == len(set(own.labels)):
                raise ValueError(f"the labels of {name} must differ, and have a count each")
        return self

    def answer_sets(self) -> dict[str, AnswerSet]:
        """What may be answered, by task."""
        return {task: AnswerSet(own.labels, own.counts) for task, own in self.tasks.items()}


def is_exported(place: Path | str) -> bool:
    """Whether a folder holds an exported model."""
    return (Path(place) / LABELS).is_file()


def own_weights(model: Any) -> dict[str, Tensor]:
    """The tensors that the base models do not hold: what trained, and what was loaded from former trials."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad or name in model.loaded
    }


def write(model: Any, folder: Path, said: Mapping[str, Any]) -> None:
    """Write the model into a folder.

    Args:
        model: a SpeechLLM.
        folder: exists.
        said: sweep, trial, corpus, fingerprint and roles, for labels.json.
    """
    tensors = own_weights(model)
    lora = {name: tensor for name, tensor in tensors.items() if part_of(name) == "lora"}
    if lora:
        _write_lora(model.llm, lora, folder / LORA, model.config.llm.path)
    save_file({name: tensor for name, tensor in tensors.items() if name not in lora}, folder / SPEECH)
    answers = {task: Answers(labels=own.labels, counts=own.counts) for task, own in model.tasks.items()}
    labels = Exported(tasks=answers, meaning=model.meaning(), digest=digest(tensors), **said)
    (folder / LABELS).write_text(labels.model_dump_json(indent=1), encoding="utf-8")


def _write_lora(llm: Any, lora: Mapping[str, Tensor], folder: Path, base: str) -> None:
    folder.mkdir()
    settings = llm.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": base}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    (folder / LORA_CONFIG).write_text(json.dumps(plain, indent=1, sort_keys=True), encoding="utf-8")
    save_file({_peft_name(name): tensor for name, tensor in lora.items()}, folder / LORA_WEIGHTS)


def _peft_name(name: str) -> str:
    """Of a parameter of the model in PEFT's files; DoRA's magnitudes lose `.weight`, too."""
    name = name.removeprefix("llm.")
    return name.replace(f"{INNER}.weight", "" if "lora_magnitude_vector" in name else ".weight")


def _model_name(name: str) -> str:
    """The inverse of `_peft_name`."""
    stem = name if name.endswith("lora_magnitude_vector") else name.removesuffix(".weight")
    return f"llm.{stem}{INNER}.weight"


def read(folder: Path) -> Exported:
    """What the model's answers mean.

    Raises:
        CheckpointError: the folder holds no exported model, or its labels.json is damaged.
    """
    path = folder / LABELS
    try:
        return Exported.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: no exported model (no {LABELS}); `sweep export` makes one") from None
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"])) or "file"
        raise CheckpointError(f"{path}: {place}: {detail['msg']}; {AGAIN}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); {AGAIN}") from None


def as_state(folder: Path) -> dict[str, Any]:
    """An exported model in the terms of a checkpoint, of a trial that started from no other.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    said = read(folder)
    try:
        tensors = load_file(folder / SPEECH)
        if (folder / LORA).exists():
            tensors |= {_model_name(name): own for name, own in load_file(folder / LORA / LORA_WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({reason(error)}); {AGAIN}") from None
    if digest(tensors) != said.digest:
        raise CheckpointError(f"{folder}: its weights are not those that {LABELS} tells of; {AGAIN}")
    known = {"digest": said.digest, "meaning": said.meaning, "fingerprint": said.fingerprint}
    return {"tensors": tensors, "parents": [], **known}
