"""The teacher of a distillation: the frozen base LLM without LoRA, which reads text where the model may hear audio.

It reads each example separately, so its logits for an example depend on no other: they are computed once for all
trials, or by a trial that finds no cached files, with the same bits. For each predicted token the cache keeps the ids
of the TOP most probable tokens, their log-probabilities, and the log-probability of all other tokens together. They are
float32, 0.5 kB a token. Float16 would save a quarter of that, but is off by 5e-4 at a log-probability of -1, which is
more than a trained student's remaining loss: the probabilities would not sum to 1, and the divergence of a distribution
from itself would not be 0.

Legend: P predicted tokens of an example, V vocabulary, K = min(TOP, V), E width.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from data.config import DataConfig
from data.errors import MisfitError
from data.loading import teacher_files
from data.loading.cached_arrays import Arrays, CacheJob, CacheKey, Layout
from data.loading.examples import Example, read_example
from data.loading.tasks import Item, items
from data.loading.teacher_files import TeacherInput
from data.shards.dataset import Shards
from model.checkpoints.fingerprint import derived_digest, identify, model_digest
from model.config import LoadIn, ModelConfig
from model.runtime.numerics import trial_numerics
from model.speech_llm.language_model import load_llm
from model.speech_llm.prompt import PromptBuilder, answer_text

TOP = 64
VERSION = 2  # raise it when the same LLM would give other logits, or the items are split into files differently


@dataclass(frozen=True)
class TeacherKey(CacheKey):
    """Everything that a teacher's logits depend on, apart from the tokens it reads."""

    path_field: ClassVar[str] = "llm"
    llm: str  # Hugging Face id or folder
    digest: str  # of its weights and settings
    dtype: str
    precision: str
    device: str  # cpu or cuda: their results differ in the last digits
    temperature: float
    top: int = TOP
    version: int = VERSION
    load_in: LoadIn = "none"
    later_fields: ClassVar[dict[str, object]] = {"load_in": "none"}


def teacher_key(model: ModelConfig, temperature: float, device: str) -> TeacherKey:
    """Return the cache key of the teacher's logits in a trial."""
    llm = model.llm
    digest = llm_digest(llm.path, llm.dtype)
    return TeacherKey(llm.path, digest, llm.dtype, model.precision, device, temperature, load_in=llm.load_in)


def llm_digest(path: str, dtype: str) -> str:
    """Return a hash that is equal for LLMs that compute the same logits. Reads all weights, once.

    Raises:
        ConfigError: see `load_llm`.
    """

    def compute() -> str:
        llm = inspect.unwrap(load_llm)(path, dtype, "cpu")  # bypass the cache: the LLM may be large
        return model_digest(llm.state_dict(), llm.config.to_dict())

    name = f"LLM in {dtype}, transformers {transformers.__version__}"  # which adds settings to those of the files
    return derived_digest(name, identify("model.llm.path", path, "llm"), compute)


def teacher_input(builder: PromptBuilder, example: Example) -> TeacherInput:
    """Return what the teacher reads for an example: the model's turns as text, and the answer; no learned vectors.

    The teacher predicts the same tokens as the model.

    Args:
        builder: of the model's prompts.
        example: may be read without its clip.
    """
    text_only = builder.text_only
    turns = example.turns[builder.prompt(example).dropped_turns :]  # the prompt may have no room for all turns
    answer = text_only.answer(answer_text(example.task, example.answer))
    ids = [*text_only.prompt(replace(example, turns=turns)).ids, *answer.inputs]
    return TeacherInput(np.array(ids, "<i4"), len(answer.targets))


def teacher_inputs(
    builder: PromptBuilder, max_positions: int | None, shards: Shards, config: DataConfig, tasks: Sequence[str]
) -> dict[Item, TeacherInput]:
    """Return what the teacher reads for the training split, the only split with a distillation loss.

    Args:
        builder: of the model's prompts.
        max_positions: the longest input of the LLM, in tokens.
        shards: the corpus.
        config: how the corpus is read.
        tasks: by name.

    Raises:
        MisfitError: an input is longer than `max_positions`.
    """
    inputs = {}
    for item in (item for task in tasks for item in items(shards, task, "train")):
        example = read_example(shards, item, config, with_audio=False)
        inputs[item] = read = teacher_input(builder, example)
        if max_positions is not None and len(read.ids) > max_positions:
            raise MisfitError(
                f"utterance {example.id}: its transcript has {len(read.ids)} tokens for the teacher of train.losses, "
                f"and {builder.config.llm.path} reads at most {max_positions}; lower data.history, or set "
                "distillation and hidden to 0"
            )
    return inputs


@torch.no_grad()
def run_teacher(llm: PreTrainedModel, read: TeacherInput, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return logits_PV in float32, and the last hidden states_PE if asked for, of one unpadded input."""
    ids = torch.tensor(read.ids, dtype=torch.long, device=llm.get_input_embeddings().weight.device)[None]
    out = llm(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
        use_cache=False,
        logits_to_keep=read.predicted,
        output_hidden_states=hidden,
    )
    return out.logits[0].float(), out.hidden_states[-1][0, -read.predicted :] if hidden else None


@torch.no_grad()
def top_log_probs(logits_PV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the most probable ids_PK, int32, and log-probabilities [P, K + 1], float32; see `TeacherLogits`.

    The last column, of all other tokens together, is minus infinity if there are no others.
    """
    log_probs_PV = (logits_PV / temperature).log_softmax(-1)
    top_PK, ids_PK = log_probs_PV.topk(min(TOP, logits_PV.shape[-1]))
    return ids_PK.int(), torch.cat([top_PK, log_prob_of_others(log_probs_PV, ids_PK)[:, None]], dim=-1)


def log_prob_of_others(log_probs_PV: Tensor, ids_PK: Tensor) -> Tensor:
    """Return the log-probability of all tokens but the given ones, [P]; without cancellation, however small it is."""
    return log_probs_PV.scatter(-1, ids_PK, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class TeacherJob(CacheJob[Item, TeacherKey]):
    """Computes the teacher's logits for the items of one file, under one key."""

    layout: ClassVar[Layout] = teacher_files.LAYOUT
    inputs: Mapping[Item, TeacherInput]  # of the file's items

    def compute(self, rows: Sequence[Item]) -> list[list[Arrays]]:
        """Return the teacher's logits for some items."""
        [key] = self.keys.values()
        llm = load_llm(key.llm, key.dtype, key.device, key.load_in)
        with trial_numerics(self.threads, key.device, key.precision):
            computed = [top_log_probs(run_teacher(llm, self.inputs[row])[0], key.temperature) for row in rows]
        return [[(ids.cpu().numpy(), log_probs.cpu().numpy()) for ids, log_probs in computed]]  # as `TeacherLogits`
