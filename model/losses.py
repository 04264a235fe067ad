"""Losses at the positions that predict an answer: next token, and closeness to the same LLM reading the transcript.

All of them are sums, one an example; what they are divided by is decided over a whole optimizer step.

Legend: B examples, L kept positions, V vocabulary, P predicted tokens of all examples, E width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import MisfitError
from data.examples import Example
from model.config import LossConfig
from model.llm import load_llm
from model.prompt import IGNORE, Answer, written
from model.speech_llm import SpeechLLM, pad_left


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
    (arXiv 2406.05968, equation 3).
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
        teacher = _teach(model, examples, hidden=config.hidden > 0)
        assert torch.equal(teacher.targets_P, read.targets_P)
    if config.distillation:
        student, taught = (logits / config.temperature for logits in (read.logits_PV, teacher.logits_PV))
        divergence_P = F.kl_div(student.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="none").sum(
            -1
        )
        found.distillation_B = _by_example(divergence_P, read, len(examples)) * config.temperature**2
    if config.hidden:
        assert read.hidden_PE is not None
        assert teacher.hidden_PE is not None
        distance_P = (read.hidden_PE.float() - teacher.hidden_PE.float()).square().mean(-1)
        found.hidden_B = _by_example(distance_P, read, len(examples))
    return found


@torch.no_grad()
def _teach(model: SpeechLLM, examples: Sequence[Example], hidden: bool) -> _Read:
    """The base LLM on the transcript of the turns that the model reads: no sound, no learned vectors, no LoRA."""
    prompter = model.transcriber
    llm = load_llm(model.config.llm.path, model.config.llm.dtype, model.place)
    inputs = llm.get_input_embeddings()  # type: ignore[operator]
    answers = [prompter.answer(written(example.task, example.answer)) for example in examples]
    sequences = [
        inputs(torch.tensor([*prompter.prompt(_read_by(model, example)).ids, *answer.inputs], device=model.device))
        for example, answer in zip(examples, answers, strict=True)
    ]
    with model.autocast():
        return _read(llm, sequences, answers, hidden)


def _read_by(model: SpeechLLM, example: Example) -> Example:
    """The example without the turns that the model has no room for."""
    return replace(example, turns=example.turns[model.prompter.prompt(example).dropped_turns :])


def teacher_cost(model: SpeechLLM, example: Example) -> int:
    """Tokens that the teacher reads for an example.

    Raises:
        MisfitError: they are more than the LLM reads at once.
    """
    prompt = model.transcriber.prompt(_read_by(model, example))
    tokens = len(prompt.ids) + len(model.answer(example).inputs)
    if model.reach is not None and tokens > model.reach:
        raise MisfitError(
            f"utterance {example.id}: its transcript takes {tokens} tokens, which the teacher of train.losses reads, "
            f"and {model.config.llm.path} reads {model.reach} at once; lower data.history, or set distillation and "
            "hidden to 0"
        )
    return tokens


def _read(llm: torch.nn.Module, sequences: Sequence[Tensor], answers: Sequence[Answer], hidden: bool) -> _Read:
    """Logits, and hidden states if asked for, at the positions that predict the answers' tokens."""
    embeddings_BTE, mask_BT, positions_BT = pad_left(sequences)
    kept = max(len(answer.targets) for answer in answers)
    out = llm(
        inputs_embeds=embeddings_BTE,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        use_cache=False,
        logits_to_keep=kept,
        output_hidden_states=hidden,
    )
    # Padded on the left, the answers end at the last position of every row.
    rows = [[IGNORE] * (kept - len(answer.targets)) + list(answer.targets) for answer in answers]
    targets_BL = torch.tensor(rows, device=embeddings_BTE.device)
    predicted_BL = targets_BL != IGNORE
    return _Read(
        rows_P=predicted_BL.nonzero()[:, 0],
        targets_P=targets_BL[predicted_BL],
        logits_PV=out.logits[predicted_BL].float(),
        hidden_PE=out.hidden_states[-1][:, -kept:][predicted_BL] if hidden else None,
    )


def _by_example(values_P: Tensor, read: _Read, examples: int) -> Tensor:
    return values_P.new_zeros(examples).index_add(0, read.rows_P, values_P)
