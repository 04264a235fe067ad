"""The examples of a trial, and predictions over a whole split: identical however the split is batched."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data.loading.batching import micro_batches, plan, share
from data.loading.examples import Example
from data.loading.prefetch import Prefetcher
from model.config import LossConfig
from model.evaluation.metrics import Record
from model.evaluation.scoring import decide, generate, label_scores
from model.evaluation.split_data import SplitData, TrialData
from model.objectives.losses import answer_losses
from model.runtime.distributed import world
from model.speech_llm.speech_llm import SpeechLLM

LOGITS = 2**28  # numbers computed at once in an evaluation: 1 GiB in fp32
TOGETHER = 64  # items of an evaluation that are cut into batches together, of similar tokens and frames


class Asked(NamedTuple):
    """A pass over items that has been asked for: it is read ahead while something else is computed."""

    batches: list[list[int]]  # positions in the split's items
    reading: Prefetcher


def ask(model: SpeechLLM, data: TrialData, split: str, token_budget: int, batch_size: int | None = None) -> Asked:
    """Start to read this worker's part of a split for `evaluate`, with the same arguments."""
    rank, workers = world()
    own = data.splits[split]
    batches: list[list[int]] = []
    for task in model.tasks:
        positions = share([place for place, item in enumerate(own.items) if item[0] == task], rank, workers)
        if batch_size is None:
            costs = [own.costs[position] for position in positions]
            for together in plan(costs, batch_size=TOGETHER, seed=0, epoch=0):
                for part in micro_batches([costs[place] for place in together], token_budget, model.pad_tolerance):
                    batches += _within_memory(model, task, own, [positions[together[place]] for place in part])
        else:
            batches += [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    return Asked(batches, data.read(split, batches))


@torch.no_grad()
def evaluate(
    model: SpeechLLM,
    data: TrialData,
    split: str,
    token_budget: int,
    batch_size: int | None = None,
    asked: Asked | None = None,
    between: Callable[[], Any] = lambda: None,
) -> list[Record]:
    """Predict a whole split, over all workers.

    Args:
        model: that predicts.
        data: with the split.
        split: by name.
        token_budget: limit on what is computed together.
        batch_size: items computed together; by default as many as fit in `token_budget`.
        asked: what `ask` returned, where it was called early.
        between: called before each batch; it may raise to end the evaluation.

    Returns:
        One record per item, in order.
    """
    batches, reading = asked or ask(model, data, split, token_budget, batch_size)
    model.eval()
    found: list[tuple[int, Record]] = []
    for batch, examples in zip(batches, reading, strict=True):
        between()
        found += zip(batch, predict(model, examples), strict=True)
    if (workers := world()[1]) > 1:
        everybody: list[Any] = [None] * workers
        dist.all_gather_object(everybody, found)
        found = [item for part in everybody for item in part]
    return [record for _, record in sorted(found, key=lambda item: item[0])]


def _within_memory(model: SpeechLLM, task: str, own: SplitData, batch: list[int]) -> list[list[int]]:
    """Cut a batch so that its logits, of which every label or token of an answer needs some, stay within LOGITS."""
    rows = len(model.tries[task].nodes) + 1
    rows = max([rows, *(own.predicted[position] for position in batch)])
    size = max(1, LOGITS // (rows * model.llm.get_input_embeddings().num_embeddings))
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def predict(model: SpeechLLM, examples: Sequence[Example]) -> list[Record]:
    """The records of examples of one task."""
    return (_label_records if model.tasks[examples[0].task].labels else _text_records)(model, examples)


def _label_records(model: SpeechLLM, examples: Sequence[Example]) -> list[Record]:
    task = examples[0].task
    labels = model.tasks[task].labels
    scores_BK = label_scores(model, examples)
    decided_BK = decide(model, task, scores_BK)
    losses = [
        -float(row[labels.index(example.answer)])
        if example.answer in labels
        # A set of labels that training does not hold: nobody can choose it, but its words have a probability.
        else float(answer_losses(model, [example], LossConfig()).next_token_B)
        for row, example in zip(scores_BK, examples, strict=True)
    ]
    return [
        _record(
            model,
            example,
            prediction=labels[int(decided_K.argmax())],
            scores=tuple(decided_K.tolist()),
            loss=loss,
        )
        for example, decided_K, loss in zip(examples, decided_BK, losses, strict=True)
    ]


def _text_records(model: SpeechLLM, examples: Sequence[Example]) -> list[Record]:
    losses = answer_losses(model, examples, LossConfig()).next_token_B.tolist()
    return [
        _record(model, example, prediction=reply.text, scores=(), loss=loss, ended=reply.ended)
        for example, reply, loss in zip(examples, generate(model, examples), losses, strict=True)
    ]


def _record(model: SpeechLLM, example: Example, **said: Any) -> Record:
    return Record(
        id=example.id,
        task=example.task,
        conversation=example.conversation,
        speaker=example.speaker,
        subset=example.subset,
        label=example.answer,
        tokens=model.answer(example).predicted,
        **said,
    )
