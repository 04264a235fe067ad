"""The teacher of a distillation: the base LLM, frozen and without LoRA, reading words where the model may hear sound.

It reads each example by itself, so what it says of one depends on nothing else: it is computed once for all trials, or
by a trial that finds no files, with the same bits. Of each predicted token its TOP likeliest ids are kept with their
log-probabilities, and the log of what is left for all others. They are float32, which rounds nothing: 0.5 kB a token.
Float16 would save a quarter of that, and be off by 5e-4 at a log-probability of -1, more than a trained student has
left to learn: the sum over all tokens would not be 1, and the divergence from oneself not 0.

Legend: P predicted tokens of an example, V vocabulary, K = min(TOP, V), E width.
"""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.config import DataConfig
from data.errors import MisfitError
from data.loading import teacher_files as taught
from data.loading.array_files import Part
from data.loading.examples import Example, read_example
from data.loading.tasks import Item, items
from data.loading.teacher_files import Taught, TeacherLogits
from data.shards.dataset import Shards
from model.checkpoints.fingerprint import Keyed, computing, model_digest
from model.config import ModelConfig
from model.speech_llm.language_model import load_llm
from model.speech_llm.prompt import PromptBuilder, answer_text

TOP = 64
VERSION = 2  # raise it when the same LLM would say something else, or the files would be cut otherwise


@dataclass(frozen=True)
class CacheKey(Keyed):
    """What a teacher's word depends on, besides what it reads."""

    place: ClassVar[str] = "llm"
    llm: str  # Hugging Face id or folder
    digest: str  # of its weights and of its configuration
    dtype: str
    precision: str
    device: str  # cpu or cuda: they differ in the last digits
    temperature: float
    top: int = TOP
    version: int = VERSION


def recipe(model: ModelConfig, temperature: float, device: str) -> CacheKey:
    """What the teacher says in a trial."""
    llm = model.llm
    digest = llm_digest(llm.path, llm.dtype)
    return CacheKey(llm.path, digest, llm.dtype, model.precision, device, temperature)


@functools.lru_cache(maxsize=8)
def llm_digest(path: str, dtype: str) -> str:
    """Equal for LLMs that say the same. Reads all weights.

    Raises:
        ConfigError: see `load_llm`.
    """
    llm: Any = inspect.unwrap(load_llm)(path, dtype, "cpu")  # not to be kept: it may be large
    return model_digest(llm.state_dict(), llm.config.to_dict())


def lesson(prompter: PromptBuilder, example: Example) -> TeacherLogits:
    """What the teacher reads for an example: the turns that the model reads, in words, and the answer; no learned
    vectors. Where it predicts, the model predicts, too.

    Args:
        prompter: the model's.
        example: may be read without its clip.
    """
    own = prompter.text_only
    turns = example.turns[prompter.prompt(example).dropped_turns :]  # there may be no room for all
    answer = own.answer(answer_text(example.task, example.answer))
    ids = [*own.prompt(replace(example, turns=turns)).ids, *answer.inputs]
    return TeacherLogits(np.array(ids, "<i4"), len(answer.targets))


def lessons(
    prompter: PromptBuilder, reach: int | None, shards: Shards, config: DataConfig, tasks: Sequence[str]
) -> dict[Item, TeacherLogits]:
    """What the teacher reads for the training split: the only one that is learnt from.

    Args:
        prompter: the model's.
        reach: tokens that the LLM reads at once.
        shards: the corpus.
        config: how it is read.
        tasks: by name.

    Raises:
        MisfitError: something is longer than the reach.
    """
    found = {}
    for item in (item for task in tasks for item in items(shards, task, "train")):
        example = read_example(shards, item, config, sound=False)
        found[item] = own = lesson(prompter, example)
        if reach is not None and len(own.ids) > reach:
            raise MisfitError(
                f"utterance {example.id}: its transcript takes {len(own.ids)} tokens, which the teacher of "
                f"train.losses reads, and {prompter.config.llm.path} reads {reach} at once; lower data.history, or set "
                "distillation and hidden to 0"
            )
    return found


@torch.no_grad()
def read(llm: Any, own: TeacherLogits, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
    """A lesson read by itself, unpadded: logits_PV in float32, and the last hidden states_PE if asked for."""
    ids = torch.tensor(own.ids, dtype=torch.long, device=llm.get_input_embeddings().weight.device)[None]
    out = llm(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
        use_cache=False,
        logits_to_keep=own.predicted,
        output_hidden_states=hidden,
    )
    return out.logits[0].float(), out.hidden_states[-1][0, -own.predicted :] if hidden else None


@torch.no_grad()
def likeliest(logits_PV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What is kept of a teacher's logits: the likeliest ids_PK, int32, and their log-probabilities with that of all
    others, [P, K + 1], float32; where there are no others, it is minus infinity."""
    log_probs_PV = (logits_PV / temperature).log_softmax(-1)
    top_PK, ids_PK = log_probs_PV.topk(min(TOP, logits_PV.shape[-1]))
    return ids_PK.int(), torch.cat([top_PK, log_of_others(log_probs_PV, ids_PK)[:, None]], dim=-1)


def log_of_others(log_probs_PV: Tensor, ids_PK: Tensor) -> Tensor:
    """The log of the probability of all tokens but the given ones, [P]; without cancellation, however small it is."""
    return log_probs_PV.scatter(-1, ids_PK, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class Job:
    """What a teacher makes of some lessons, to be computed: travels to the process that does it."""

    part: Part[Item]
    lessons: Sequence[TeacherLogits]  # of its rows
    recipe: CacheKey
    folder: Path
    threads: int

    def compute(self, rows: Sequence[Item]) -> list[Taught]:
        """What the teacher says about some rows."""
        made, own = self.recipe, dict(zip(self.part.rows, self.lessons, strict=True))
        llm = load_llm(made.llm, made.dtype, made.device)
        with computing(self.threads, made.device, made.precision):
            found = [likeliest(read(llm, own[row])[0], made.temperature) for row in rows]
        return [(ids.cpu().numpy(), log_probs.cpu().numpy()) for ids, log_probs in found]

    def __call__(self) -> pa.Table:
        """Compute and write it; a table with the bytes and the tokens."""
        size = taught.write(self.folder, self.part, self.compute(self.part.rows))
        return pa.table({"bytes": [size], "size": [self.part.size]})
