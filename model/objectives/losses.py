"""Losses at the positions that predict an answer: next token, distillation, and distance of hidden states.

Every loss is a sum over the predicted tokens of an example. The trainer divides it once, by the count over the whole
optimizer step, so no result depends on how a step is cut into micro-batches.

Legend: B examples, T positions, P predicted tokens of all examples, V vocabulary, K likeliest tokens of the teacher,
E width of the LLM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from data.loading.examples import Example
from model.compat import no_search_for_packed_rows
from model.config import LossConfig
from model.objectives import teacher
from model.runtime.device import on_device
from model.speech_llm.label_trie import LabelTrie
from model.speech_llm.language_model import head_at_positions, load_base
from model.speech_llm.packing import is_packing, pack
from model.speech_llm.prompt import IGNORE, Answer
from model.speech_llm.speech_llm import SpeechLLM


class Share(NamedTuple):
    """The part of a label in a soft target. Each of both numbers sums to 1 over the labels."""

    share: float  # of the annotators who gave it
    weighted: float  # the same, in proportion to the label's class weight


SoftTarget = Mapping[str, Share]  # by label


@dataclass
class Losses:
    """Sums over the predicted tokens of each example.

    A loss of weight 0 is None, except that of the next token, which is computed without gradient to be reported.
    """

    count_B: list[int]  # predicted tokens of the answer
    next_token_B: Tensor  # nats; of a soft target the mean over the annotators' labels
    weighted_next_token_B: Tensor | None = None  # the same with class weights, which is minimised; None: no difference
    distillation_B: Tensor | None = None  # nats, times the square of the temperature
    hidden_B: Tensor | None = None  # mean square over the width

    def by_name(self) -> dict[str, Tensor]:
        """Return the losses that were computed, without gradient."""
        named = {"next_token": self.next_token_B, "distillation": self.distillation_B, "hidden": self.hidden_B}
        return {name: values_B.detach() for name, values_B in named.items() if values_B is not None}

    def weighted_sum(self, config: LossConfig) -> Tensor:
        """Return the sum that training minimises, for each example."""
        weighted_B = self.weighted_next_token_B
        total_B = config.next_token * (self.next_token_B if weighted_B is None else weighted_B)
        if self.distillation_B is not None:
            total_B = total_B + config.distillation * self.distillation_B
        if self.hidden_B is not None:
            total_B = total_B + config.hidden * self.hidden_B
        return total_B


@dataclass
class StudentOutputs:
    """Outputs of the model at the predicted tokens."""

    rows_P: Tensor  # the example of each token
    targets_P: Tensor
    logits_PV: Tensor
    hidden_PE: Tensor | None  # last hidden states

    def sum_by_example(self, values_P: Tensor, n_examples: int) -> Tensor:
        """Return values_B: the sum over the tokens of each example."""
        return values_P.new_zeros(n_examples).index_add(0, self.rows_P, values_P)

    def select(self, indices: Tensor) -> "StudentOutputs":
        """Return the outputs at some of the tokens."""
        hidden_PE = None if self.hidden_PE is None else self.hidden_PE[indices]
        return StudentOutputs(self.rows_P[indices], self.targets_P[indices], self.logits_PV[indices], hidden_PE)


@dataclass
class TeacherOutputs:
    """Outputs of the teacher at the predicted tokens."""

    ids_PK: Tensor
    log_probs_PK: Tensor  # of these tokens, and in a last column of all other tokens together
    hidden_PE: Tensor | None


def answer_losses(
    model: SpeechLLM,
    examples: Sequence[Example],
    config: LossConfig,
    targets: Sequence[SoftTarget | None] | None = None,
) -> Losses:
    """Return the losses of the examples' answers.

    The teacher of the distillation (Hinton et al., 2015, arXiv 1503.02531) is the base LLM without LoRA, which reads
    text where the model may read audio (arXiv 2406.05968, equation 3). Its logits come with the examples if they were
    cached; otherwise it runs here, with the same result.

    The next-token loss of a soft target is its cross-entropy with the model's probabilities of the labels' texts, as
    `label_scores` returns them: the mean of the loss over the annotators' labels. The other losses follow the answer.

    Args:
        model: that is trained or evaluated.
        examples: of any tasks.
        config: which losses are computed.
        targets: the soft target of each example, or None for its answer; by default all have their answers.
    """
    answers, n_examples = [model.answer(example) for example in examples], len(examples)
    soft = targets if targets is not None and any(targets) else None
    with model.autocast():
        prompts = model.prompts(examples)
        if soft is None:
            sequences = [
                torch.cat([prompt_TE, model.embed(answer.inputs)])
                for prompt_TE, answer in zip(prompts, answers, strict=True)
            ]
            labels = student = student_outputs(model.llm, sequences, answers, hidden=config.hidden > 0)
        else:
            tries = [model.answer_trie(example, target or ()) for example, target in zip(examples, soft, strict=True)]
            sequences = [
                torch.cat([prompt_TE, model.embed(trie.nodes)]) for prompt_TE, trie in zip(prompts, tries, strict=True)
            ]
            labels = trie_outputs(model.llm, sequences, tries, hidden=config.hidden > 0)
            paths = [path for trie in tries for path in first_paths(trie).values()]
            of_answers = [index for index, path in enumerate(paths) if path == 0]
            student = labels.select(on_device(of_answers, model.device))
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.next_token > 0):
        nll_P = F.cross_entropy(labels.logits_PV, labels.targets_P, reduction="none")
        weighted_B = None
        if soft is None:
            next_token_B = labels.sum_by_example(nll_P, n_examples)
        else:
            shares_P, weighted_P = on_device(token_shares(examples, tries, soft), model.device).unbind(-1)
            next_token_B = labels.sum_by_example(nll_P * shares_P, n_examples)
            weighted_B = labels.sum_by_example(nll_P * weighted_P, n_examples)
    predicted = [answer.predicted for answer in answers]
    losses = Losses(predicted, next_token_B, weighted_B)
    if config.distillation or config.hidden:
        teacher_output = teacher_outputs(model, examples, config)
        assert len(teacher_output.ids_PK) == len(student.targets_P)
    if config.distillation:
        divergence_P = divergence(
            student.logits_PV / config.temperature, teacher_output.ids_PK, teacher_output.log_probs_PK
        )
        # The gradient of a softened divergence shrinks with the square of the temperature (Hinton et al., section 2).
        losses.distillation_B = student.sum_by_example(divergence_P, len(examples)) * config.temperature**2
    if config.hidden:
        assert student.hidden_PE is not None
        assert teacher_output.hidden_PE is not None
        distance_P = (student.hidden_PE.float() - teacher_output.hidden_PE.float()).square().mean(-1)
        losses.hidden_B = student.sum_by_example(distance_P, len(examples))
    return losses


def student_outputs(
    llm: PreTrainedModel, sequences: Sequence[Tensor], answers: Sequence[Answer], hidden: bool
) -> StudentOutputs:
    """Run the LLM over sequences of embeddings and return its outputs where it predicts tokens of the answers.

    Args:
        llm: the causal language model.
        sequences: prompt and inputs of the answer for each example, [T_i, E].
        answers: for each example.
        hidden: whether to return hidden states.
    """
    predicted = [
        (row, len(sequence) - len(answer.targets) + step, target)
        for row, (sequence, answer) in enumerate(zip(sequences, answers, strict=True))
        for step, target in enumerate(answer.targets)
        if target != IGNORE
    ]
    return _outputs_at(llm, sequences, None, predicted, hidden)


def trie_outputs(
    llm: PreTrainedModel, sequences: Sequence[Tensor], tries: Sequence[LabelTrie], hidden: bool
) -> StudentOutputs:
    """Run the LLM once over prompts that are followed by tries, and return its outputs where it predicts tokens.

    A node of a trie sees the prompt and its ancestors, so each label is computed as if it followed the prompt alone.

    Args:
        llm: the causal language model.
        sequences: prompt and nodes of the trie for each example, [T_i, E].
        tries: for each example; the predicted tokens are in the order of `first_paths`.
        hidden: whether to return hidden states.
    """
    predicted = [
        (row, len(sequence) - len(trie.nodes) + node, target)
        for row, (sequence, trie) in enumerate(zip(sequences, tries, strict=True))
        for node, target in first_paths(trie)
    ]
    return _outputs_at(llm, sequences, tries, predicted, hidden)


def _outputs_at(
    llm: PreTrainedModel,
    sequences: Sequence[Tensor],
    tries: Sequence[LabelTrie] | None,
    predicted: Sequence[tuple[int, int, int]],
    hidden: bool,
) -> StudentOutputs:
    """Run the LLM over sequences, and return its outputs at predicted tokens, given as (sequence, position, target)."""
    device = sequences[0].device
    if is_packing(llm):
        packed = pack(sequences, tries)
        places, inputs = [(0, packed.starts[row] + column) for row, column, _ in predicted], packed.inputs()
    else:
        places = [(row, column) for row, column, _ in predicted]
        inputs = _padded_inputs(sequences, tries)
    indices = [(*place, row, target) for place, (row, _, target) in zip(places, predicted, strict=True)]
    batch_P, columns_P, rows_P, targets_P = on_device(indices, device).unbind(-1)
    with head_at_positions(llm.get_output_embeddings(), batch_P, columns_P), no_search_for_packed_rows():
        output = llm(**inputs, use_cache=False, output_hidden_states=hidden)
    return StudentOutputs(
        rows_P=rows_P,
        targets_P=targets_P,
        logits_PV=output.logits.float(),
        hidden_PE=output.hidden_states[-1][batch_P, columns_P] if hidden else None,
    )


def _padded_inputs(sequences: Sequence[Tensor], tries: Sequence[LabelTrie] | None) -> dict[str, object]:
    """Return the keywords of a forward pass over sequences that are padded on the right.

    No position of a causal LLM sees what is on its right: without tries the batch needs no mask, so attention can skip
    what is masked anyway, and default positions are correct.
    """
    embeddings_BTE = pad_sequence(list(sequences), batch_first=True)
    if tries is None:
        return {"inputs_embeds": embeddings_BTE}
    width, device = embeddings_BTE.shape[1], embeddings_BTE.device
    visible_BTT = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(sequences), 1, 1)
    positions_BT = torch.arange(width).repeat(len(sequences), 1)
    for row, (sequence, trie) in enumerate(zip(sequences, tries, strict=True)):
        first, end = len(sequence) - len(trie.nodes), len(sequence)
        ancestors_NN = torch.tensor(trie.ancestors, dtype=torch.bool).reshape(end - first, end - first)
        visible_BTT[row, first:end, first:end] = ancestors_NN
        positions_BT[row, first:end] = first - 1 + ancestors_NN.sum(-1)
    bias_BTT = torch.zeros(visible_BTT.shape, dtype=embeddings_BTE.dtype, device=device)
    bias_BTT.masked_fill_(~on_device(visible_BTT, device), torch.finfo(bias_BTT.dtype).min)
    return {
        "inputs_embeds": embeddings_BTE,
        "attention_mask": bias_BTT[:, None],
        "position_ids": on_device(positions_BT, device),
    }


def first_paths(trie: LabelTrie) -> dict[tuple[int, int], int]:
    """Return the predictions (node, target) of a trie, and the first of its paths that each is on."""
    first: dict[tuple[int, int], int] = {}
    for index, path in enumerate(trie.paths):
        for prediction in path:
            first.setdefault(prediction, index)
    return first


def token_shares(
    examples: Sequence[Example], tries: Sequence[LabelTrie], targets: Sequence[SoftTarget | None]
) -> list[list[float]]:
    """Return for each prediction of `first_paths` the sums over the labels that it belongs to, [P, 2]; see `Share`."""
    none, everything = Share(0.0, 0.0), Share(1.0, 1.0)
    shares = list[list[float]]()
    for example, trie, target in zip(examples, tries, targets, strict=True):
        given = {example.answer: everything} if target is None else {example.answer: none, **target}
        sums = {prediction: [0.0, 0.0] for prediction in first_paths(trie)}
        for label, path in zip(given, trie.paths, strict=True):  # both begin with the answer
            for prediction in path:
                sums[prediction] = [sum(pair) for pair in zip(sums[prediction], given[label], strict=True)]
        shares += sums.values()
    return shares


def teacher_outputs(model: SpeechLLM, examples: Sequence[Example], config: LossConfig) -> TeacherOutputs:
    """Return the cached outputs of the teacher, or run it over one example at a time.

    Hidden states are too large for the cache, so a loss that uses them always runs the teacher.
    """
    top, hidden = [], []
    for example in examples:
        if example.teacher_logits is not None and not config.hidden:
            ids_PK, log_probs_PK = (on_device(values, model.device) for values in example.teacher_logits)
        else:
            llm = load_base(model.config.llm, model.base_device)
            with model.autocast():
                read = teacher.teacher_input(model.prompt_builder, example)
                logits_PV, hidden_PE = teacher.run_teacher(llm, read, hidden=config.hidden > 0)
                ids_PK, log_probs_PK = teacher.top_log_probs(logits_PV, config.temperature)
            hidden.append(hidden_PE)
        top.append((ids_PK, log_probs_PK))
    ids_PK, log_probs_PK = (torch.cat(column) for column in zip(*top, strict=True))
    states = torch.cat([hidden_PE for hidden_PE in hidden if hidden_PE is not None]) if config.hidden else None
    return TeacherOutputs(ids_PK, log_probs_PK, states)


def divergence(logits_PV: Tensor, ids_PK: Tensor, log_probs_PK: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of the student from the teacher at each token, in nats, [P].

    Only the teacher's likeliest tokens are known one by one; all other tokens count as one. By the log-sum inequality
    (Cover and Thomas, Elements of Information Theory, theorem 2.7.1) the result is a lower bound of the divergence over
    the whole vocabulary. It is exact where the student's other tokens are in proportion to the teacher's.

    Args:
        logits_PV: of the student, divided by the temperature.
        ids_PK: the teacher's likeliest tokens.
        log_probs_PK: their log-probabilities, and in a last column that of all other tokens.
    """
    student_PV, ids_PK, teacher_PK = logits_PV.log_softmax(-1), ids_PK.long(), log_probs_PK
    student_PK = student_PV.gather(-1, ids_PK)
    if ids_PK.shape[-1] < student_PV.shape[-1]:
        student_PK = torch.cat([student_PK, teacher.log_prob_of_others(student_PV, ids_PK)[:, None]], dim=-1)
    else:
        teacher_PK = teacher_PK[:, :-1]
    p_PK, q_PK = teacher_PK.exp(), student_PK.exp()
    # Both sum to 1. Their difference cancels the rounding of the logarithms, which is as large as a small divergence.
    return (p_PK * (teacher_PK - student_PK) - p_PK + q_PK).sum(-1)
