"""Predict a whole split: the records are identical however the split is cut into batches.

Shapes: B examples, K labels of a task.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from data.loading.batching import plan, share
from data.loading.examples import Example
from data.loading.prefetch import Prefetcher
from model.config import LossConfig
from model.evaluation.metrics import Record
from model.evaluation.scoring import decide, generate, label_scores
from model.evaluation.split_data import SplitData, TrialData
from model.objectives.losses import answer_losses
from model.runtime.device import uploaded
from model.runtime.distributed import gather, world
from model.speech_llm.speech_llm import SpeechLLM

MAX_LOGITS = 2**28  # computed at once in an evaluation: 1 GiB in fp32
POOL = 64  # items of an evaluation that are sorted into batches together, by tokens and frames


class PendingBatches(NamedTuple):
    """Batches that were requested: they are read ahead while something else is computed."""

    batches: list[list[int]]  # positions in the split's items
    reader: Prefetcher


def request_batches(
    model: SpeechLLM, data: TrialData, split: str, token_budget: int, batch_size: int | None = None
) -> PendingBatches:
    """Start to read this worker's part of a split for `evaluate`, with the same arguments."""
    rank, workers = world()
    items = data.splits[split]
    batches: list[list[int]] = []
    for task, answers in model.tasks.items():
        of_task = [position for position, item in enumerate(items.items) if item[0] == task]
        positions = share(of_task, rank, workers)
        if batch_size is not None:
            batches += [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
            continue
        costs = [items.costs[position] for position in positions]
        for pool in plan(costs, batch_size=POOL, seed=0, epoch=0):
            pads = not answers.labels  # replies are generated in padded batches
            for part in model.micro_batches([costs[index] for index in pool], token_budget, pads=pads):
                batches += _limit_logits(model, task, items, [positions[pool[index]] for index in part])
    return PendingBatches(batches, data.read(split, batches))


def _limit_logits(model: SpeechLLM, task: str, items: SplitData, batch: list[int]) -> list[list[int]]:
    """Cut a batch so that its logits, one row for every label node or token of an answer, stay within MAX_LOGITS."""
    rows = max([len(model.tries[task].nodes) + 1, *(items.predicted[position] for position in batch)])
    size = max(1, MAX_LOGITS // (rows * model.llm.get_input_embeddings().num_embeddings))
    return [batch[start : start + size] for start in range(0, len(batch), size)]


@torch.no_grad()
def evaluate(
    model: SpeechLLM,
    data: TrialData,
    split: str,
    token_budget: int,
    batch_size: int | None = None,
    pending: PendingBatches | None = None,
    before_batch: Callable[[], object] = lambda: None,
) -> list[Record]:
    """Predict a whole split, over all workers.

    Args:
        model: that predicts.
        data: with the split.
        split: by name.
        token_budget: limit on the tokens and frames that are computed together.
        batch_size: items computed together; by default as many as fit into `token_budget`.
        pending: what `request_batches` returned, if it was called before.
        before_batch: called before each batch; it may raise to end the evaluation.

    Returns:
        One record per item, in the order of the items.
    """
    batches, reader = pending or request_batches(model, data, split, token_budget, batch_size)
    model.eval()
    records: list[tuple[int, Record]] = []
    started: tuple[list[int], Callable[[], list[Record]]] | None = None
    with model.keep_pace():
        for batch, examples in zip(batches, uploaded(reader, model.device), strict=True):
            before_batch()
            following = batch, predict(model, examples)
            if started is not None:
                records += zip(started[0], started[1](), strict=True)
            started = following
    if started is not None:
        records += zip(started[0], started[1](), strict=True)
    all_records = [pair for part in gather(records) for pair in part]
    return [record for _, record in sorted(all_records, key=lambda pair: pair[0])]


def predict(model: SpeechLLM, examples: Sequence[Example]) -> Callable[[], list[Record]]:
    """Start to predict examples of one task.

    Returns:
        A function that waits for the device and returns the records. While the next batch is computed, it reads this
        one.
    """
    return (_label_records if model.tasks[examples[0].task].labels else _text_records)(model, examples)


def _label_records(model: SpeechLLM, examples: Sequence[Example]) -> Callable[[], list[Record]]:
    task = examples[0].task
    labels = model.tasks[task].labels
    scores_BK = label_scores(model, examples)
    decided_BK = decide(model, task, scores_BK)
    best_B1 = decided_BK.argmax(-1, keepdim=True)
    # A set of labels that training lacks cannot be predicted, but its text has a probability.
    unseen = {
        index: answer_losses(model, [example], LossConfig()).next_token_B
        for index, example in enumerate(examples)
        if example.answer not in labels
    }

    def read() -> list[Record]:
        records, count = [], len(labels)
        rows = torch.cat([scores_BK, decided_BK, best_B1.to(scores_BK.dtype)], dim=-1).tolist()
        for index, (example, row) in enumerate(zip(examples, rows, strict=True)):
            loss = float(unseen[index]) if index in unseen else -row[labels.index(example.answer)]
            decided = tuple(row[count : 2 * count])
            records.append(_record(model, example, labels[int(row[-1])], loss, decided))
        return records

    return read


def _text_records(model: SpeechLLM, examples: Sequence[Example]) -> Callable[[], list[Record]]:
    losses_B = answer_losses(model, examples, LossConfig()).next_token_B
    replies = generate(model, examples)  # waits for every token

    def read() -> list[Record]:
        return [
            _record(model, example, reply.text, loss, ended=reply.ended)
            for example, reply, loss in zip(examples, replies, losses_B.tolist(), strict=True)
        ]

    return read


def _record(
    model: SpeechLLM,
    example: Example,
    prediction: str,
    loss: float,
    scores: tuple[float, ...] = (),
    ended: bool = True,
) -> Record:
    return Record(
        id=example.id,
        task=example.task,
        conversation=example.conversation,
        speaker=example.speaker,
        subset=example.subset,
        label=example.answer,
        prediction=prediction,
        scores=scores,
        loss=loss,
        tokens=model.answer(example).predicted,
        ended=ended,
    )
