"""Losses at the positions that predict an answer: next token, and closeness to the same LLM reading the transcript.

All of them are sums, one an example; what they are divided by is decided over a whole optimizer step.

Legend: B examples, V vocabulary, P predicted tokens of all examples, K likeliest tokens, E width.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data.loading.examples import Example
from model.config import LossConfig
from model.objectives import teacher
from model.runtime.device import on_device
from model.speech_llm.language_model import load_llm
from model.speech_llm.prompt import IGNORE, Answer
from model.speech_llm.speech_llm import SpeechLLM


@dataclass
class Losses:
    """Sums over the predicted tokens of each example; without gradient, or None, for a loss of weight 0."""

    count_B: list[int]  # predicted tokens
    next_token_B: Tensor  # nats
    distillation_B: Tensor | None = None  # nats, times the square of the temperature
    hidden_B: Tensor | None = None  # mean square over the width

    def parts(self) -> dict[str, Tensor]:
        """The losses that were computed, by name."""
        named = {"next_token": self.next_token_B, "distillation": self.distillation_B, "hidden": self.hidden_B}
        return {name: values_B.detach() for name, values_B in named.items() if values_B is not None}

    def weighted(self, config: LossConfig) -> Tensor:
        """The sum that is minimised, one an example."""
        total_B = config.next_token * self.next_token_B
        if self.distillation_B is not None:
            total_B = total_B + config.distillation * self.distillation_B
        if self.hidden_B is not None:
            total_B = total_B + config.hidden * self.hidden_B
        return total_B


@dataclass
class _Read:
    """What an LLM makes of answers that follow their prompts."""

    rows_P: Tensor  # the example of each predicted token
    targets_P: Tensor
    logits_PV: Tensor
    hidden_PE: Tensor | None  # last hidden states


def answer_losses(model: SpeechLLM, examples: Sequence[Example], config: LossConfig) -> Losses:
    """The losses of the examples' answers.

    The teacher of the distillation is the base LLM without LoRA, which reads words where the model may hear sound
    (arXiv 2406.05968, equation 3). Examples may bring what it said; else it reads now, to the same end.
    """
    answers = [model.answer(example) for example in examples]
    with model.autocast():
        sequences = [
            torch.cat([prompt, model.embed(answer.inputs)])
            for prompt, answer in zip(model.prompts(examples), answers, strict=True)
        ]
        read = _read(model.llm, sequences, answers, hidden=config.hidden > 0)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.next_token > 0):  # at 0 it is shown, at no cost
        nll_P = F.cross_entropy(read.logits_PV, read.targets_P, reduction="none")
    found = Losses([answer.predicted for answer in answers], _by_example(nll_P, read, len(examples)))
    if config.distillation or config.hidden:
        taught = _teach(model, examples, config)
        assert len(taught.ids_PK) == len(read.targets_P)
    if config.distillation:
        divergence_P = divergence(read.logits_PV / config.temperature, taught.ids_PK, taught.log_probs_PK)
        found.distillation_B = _by_example(divergence_P, read, len(examples)) * config.temperature**2
    if config.hidden:
        assert read.hidden_PE is not None
        assert taught.hidden_PE is not None
        distance_P = (read.hidden_PE.float() - taught.hidden_PE.float()).square().mean(-1)
        found.hidden_B = _by_example(distance_P, read, len(examples))
    return found


def divergence(logits_PV: Tensor, ids_PK: Tensor, log_probs_PK: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a student from a teacher of whom the likeliest tokens are known, in nats, [P].

    All other tokens count as one. That makes it a lower bound of the divergence over the whole vocabulary, by the
    log-sum inequality (Cover and Thomas, Elements of Information Theory, theorem 2.7.1), which it equals where the
    student's others are in proportion to the teacher's, or where there are none.

    Args:
        logits_PV: the student's, over the temperature.
        ids_PK: the teacher's likeliest tokens.
        log_probs_PK: theirs, and in a last column that of all others.
    """
    student_PV, ids_PK, known_PK = logits_PV.log_softmax(-1), ids_PK.long(), log_probs_PK
    learnt_PK = student_PV.gather(-1, ids_PK)
    if ids_PK.shape[-1] < student_PV.shape[-1]:
        learnt_PK = torch.cat([learnt_PK, teacher.log_of_others(student_PV, ids_PK)[:, None]], dim=-1)
    else:
        known_PK = known_PK[:, :-1]
    p_PK, q_PK = known_PK.exp(), learnt_PK.exp()
    # Both sum to 1; their difference takes the rounding of the logarithms out, which is as large as what is learnt.
    return (p_PK * (known_PK - learnt_PK) - p_PK + q_PK).sum(-1)


@dataclass
class _Taught:
    """What the teacher says at the predicted tokens."""

    ids_PK: Tensor
    log_probs_PK: Tensor
    hidden_PE: Tensor | None


def _teach(model: SpeechLLM, examples: Sequence[Example], config: LossConfig) -> _Taught:
    """As the examples bring it, or read now, one at a time. Hidden states are not kept: they are always read now."""
    kept, states = [], []
    for example in examples:
        if example.taught is not None and not config.hidden:
            ids, log_probs = (on_device(values, model.device) for values in example.taught)
        else:
            llm = load_llm(model.config.llm.path, model.config.llm.dtype, model.place)
            with model.autocast():
                logits_PV, hidden_PE = teacher.read(
                    llm, teacher.lesson(model.prompter, example), hidden=config.hidden > 0
                )
                ids, log_probs = teacher.likeliest(logits_PV, config.temperature)
            states.append(hidden_PE)
        kept.append((ids, log_probs))
    ids_PK, log_probs_PK = (torch.cat(column) for column in zip(*kept, strict=True))
    return _Taught(
        ids_PK, log_probs_PK, torch.cat([own for own in states if own is not None]) if config.hidden else None
    )


def _read(llm: Any, sequences: Sequence[Tensor], answers: Sequence[Answer], hidden: bool) -> _Read:
    """Logits, and hidden states if asked for, at the positions that predict the answers' tokens.

    Padded on the right, where no position of a causal LLM looks: it needs no mask, which lets attention skip what is
    masked, and positions count from 0 by themselves.
    """
    embeddings_BTE = pad_sequence(list(sequences), batch_first=True)
    places = [
        (row, len(sequence) - len(answer.targets) + place, target)
        for row, (sequence, answer) in enumerate(zip(sequences, answers, strict=True))
        for place, target in enumerate(answer.targets)
        if target != IGNORE
    ]
    rows_P, columns_P, targets_P = on_device(places, embeddings_BTE.device).unbind(-1)
    with _at(llm.get_output_embeddings(), rows_P, columns_P):
        out = llm(inputs_embeds=embeddings_BTE, use_cache=False, output_hidden_states=hidden)
    return _Read(
        rows_P=rows_P,
        targets_P=targets_P,
        logits_PV=out.logits.float(),
        hidden_PE=out.hidden_states[-1][rows_P, columns_P] if hidden else None,
    )


@contextlib.contextmanager
def _at(head: nn.Module, rows_P: Tensor, columns_P: Tensor) -> Iterator[None]:
    """The LM head computes logits_PV of these positions alone."""
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][rows_P, columns_P],))
    try:
        yield
    finally:
        hook.remove()


def _by_example(values_P: Tensor, read: _Read, examples: int) -> Tensor:
    return values_P.new_zeros(examples).index_add(0, read.rows_P, values_P)
