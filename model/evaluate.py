"""The examples of a trial, and predictions over a whole split: identical however the split is batched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import UserError
from data.examples import Example, has_sound, read_example, targets
from data.plan import micro_batches, share
from data.shards import Shards
from data.stream import SOURCES, Source
from model.metrics import Record
from model.speech_llm import SpeechLLM


def world() -> tuple[int, int]:
    """(rank, number of workers) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclass
class TrialData:
    """The examples of a trial: rows of the index by split, what each costs, and where batches come from."""

    shards: Shards
    source: Source
    history: int
    rows: dict[str, list[int]]
    costs: dict[str, list[int]]
    dropped_turns: int  # turns of history that no prompt had room for, over all splits

    @classmethod
    def open(cls, shards: Shards, model: SpeechLLM, history: int, reader: str, splits: Sequence[str]) -> "TrialData":
        """Choose the examples of `splits` and plan by what this model computes for each.

        Raises:
            DataError: a split is empty, or the model needs sound and the corpus has none.
        """
        if model.config.hears and not has_sound(shards):
            raise UserError(
                f"{shards.folder}: model.modality {model.config.modality!r} needs sound and this corpus is text only; "
                "use model.modality=text, or prepare the corpus with --audio"
            )
        rows = {split: targets(shards, split) for split in splits}
        samples = shards.columns["n_samples"]
        costs: dict[str, list[int]] = {split: [] for split in splits}
        dropped = 0
        for split in splits:
            for row in rows[split]:
                prompt = model.prompter.prompt(read_example(shards, row, history, sound=False))
                costs[split].append(model.cost(prompt, samples[row]))
                dropped += prompt.dropped_turns
        source = SOURCES[reader](shards, history, model.config.hears)
        return cls(shards, source, history, rows, costs, dropped)

    def read(self, split: str, batches: Sequence[Sequence[int]]) -> Iterator[list[Example]]:
        """Examples by batch; `batches` hold positions in `rows[split]`."""
        rows = self.rows[split]
        return self.source([[rows[position] for position in batch] for batch in batches])


@torch.no_grad()
def evaluate(
    model: SpeechLLM, data: TrialData, split: str, token_budget: int, batch_size: int | None = None
) -> tuple[list[Record], float]:
    """Predict a whole split, over all workers.

    Args:
        batch_size: utterances computed together; by default as many as fit in `token_budget`.

    Returns:
        One record per utterance in the order of the index, and the mean loss (nats per predicted token).
    """
    rank, workers = world()
    positions = share(range(len(data.rows[split])), rank, workers)
    costs = [data.costs[split][position] for position in positions]
    if batch_size is None:
        batches = [[positions[place] for place in part] for part in micro_batches(costs, token_budget)]
    else:
        batches = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    model.eval()
    found: list[tuple[int, Record]] = []
    total, count = 0.0, 0
    for batch, examples in zip(batches, data.read(split, batches), strict=True):
        scores_BK = model.score(examples)
        lengths = [len(model.trie.paths[model.labels.index(example.label)]) for example in examples]
        truth = torch.tensor([model.labels.index(example.label) for example in examples], device=scores_BK.device)
        total -= scores_BK.double().gather(1, truth[:, None]).sum().item()
        count += sum(lengths)
        found += [
            (position, _record(example, scores_K, model))
            for position, example, scores_K in zip(batch, examples, scores_BK, strict=True)
        ]
    return _gather(found, total, count, workers)


def _record(example: Example, scores_K: Tensor, model: SpeechLLM) -> Record:
    return Record(
        id=example.id,
        conversation=example.conversation,
        speaker=example.speaker,
        subset=example.subset,
        label=example.label,
        prediction=model.labels[int(scores_K.argmax())],
        scores=tuple(scores_K.tolist()),
    )


def _gather(found: list[tuple[int, Record]], total: float, count: int, workers: int) -> tuple[list[Record], float]:
    if workers > 1:
        parts: list[Any] = [None] * workers
        dist.all_gather_object(parts, (found, total, count))
        found = [item for part, _, _ in parts for item in part]
        total, count = sum(part[1] for part in parts), sum(part[2] for part in parts)
    return [record for _, record in sorted(found, key=lambda item: item[0])], total / count
