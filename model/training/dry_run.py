"""Dry run of a trial: the time and memory of its training, measured by the training loop itself before it starts.

A `Trainer` in a temporary folder trains on the longest example alone, which no token budget can make cheaper, and then
makes two steps of its first epoch, the largest one and the median one. It also predicts a median validation batch of
each task. The time of an epoch is projected from the number of positions in these batches.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from data.config import TaskWeights
from data.loading.batching import Cost, micro_batches, plan, share
from model.config import TrainConfig
from model.evaluation.evaluator import PendingBatches, request_batches
from model.evaluation.split_data import TrialData
from model.runtime.memory import Peak
from model.speech_llm.speech_llm import SpeechLLM
from model.training.trainer import Trainer


class TrialCost(BaseModel):
    """Time and memory of a trial on one of its workers. Files contain the aliases."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)
    train_seconds: float = Field(alias="train", description="Seconds of the optimizer steps of an epoch.")
    val_seconds: float = Field(alias="val", description="Seconds of an evaluation.")
    min_bytes: int = Field(alias="least", description="Peak memory with one example at a time.")
    full_bytes: int = Field(alias="full", description="Peak memory with as many examples as train.token_budget allows.")
    token_budget: int = Field(alias="budget", description="Tokens and frames at once that fit.")


def measure(
    model: SpeechLLM, data: TrialData, config: TrainConfig, tasks: TaskWeights, seed: int, workers: int, peak: Peak
) -> TrialCost:
    """Measure a trial in a dry run. The model must not be used afterwards.

    Args:
        model: as `fit` gets it.
        data: with the splits train and val.
        config: of the training.
        tasks: weights of the model's tasks.
        seed: of the batch plan.
        workers: that share a step; this process computes the first one's share.
        peak: of this process, created before the model was built.

    Raises:
        OutOfMemoryError: one example alone does not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, data, config, tasks, seed, Path(folder))
        try:
            costs = trainer.train.costs
            longest = max(range(len(costs)), key=lambda position: sum(costs[position]))
            model.train()
            _step(trainer, [longest], 1)
            min_bytes = peak.read()
            train_seconds = _measure_epoch(trainer, workers)
            val_seconds = _measure_evaluation(trainer) / workers
            return TrialCost(
                train_seconds=train_seconds,
                val_seconds=val_seconds,
                min_bytes=min_bytes,
                full_bytes=peak.read(),
                token_budget=trainer.token_budget,
            )
        finally:
            data.close()


def _measure_epoch(trainer: Trainer, workers: int) -> float:
    """Return the projected seconds of the optimizer steps of an epoch."""
    size, train = trainer.config.batch_size, trainer.train
    steps = plan(train.costs, batch_size=size, seed=trainer.seed, epoch=0, weights=trainer.sampling_weights)

    def positions(step: Sequence[int]) -> int:
        costs = [train.costs[position] for position in share(step, 0, workers)]
        return sum(
            _positions(costs, part) for part in micro_batches(costs, trainer.token_budget, trainer.model.pad_tolerance)
        )

    return _project(steps, positions, lambda step: _step(trainer, step, workers), (1.0, 0.5))


def _measure_evaluation(trainer: Trainer) -> float:
    """Return the projected seconds of an evaluation by one worker, projected for each task separately."""
    model, data, val = trainer.model, trainer.data, trainer.data.splits["val"]
    pending = request_batches(model, data, "val", trainer.token_budget)
    pending.reader.close()
    by_task: dict[str, list[list[int]]] = {}
    for batch in pending.batches:
        by_task.setdefault(val.items[batch[0]][0], []).append(batch)

    def predict(batch: Sequence[int]) -> float:
        trainer.validation = PendingBatches([list(batch)], data.read("val", [batch]))
        started = time.monotonic()
        trainer.validate()
        return time.monotonic() - started

    return sum(
        _project(batches, lambda batch: _positions(val.costs, batch), predict, (0.5,)) for batches in by_task.values()
    )


def _project(
    batches: Sequence[Sequence[int]],
    positions: Callable[[Sequence[int]], int],
    seconds: Callable[[Sequence[int]], float],
    quantiles: Sequence[float],
) -> float:
    """Return the seconds of all batches, projected from the batches at some quantiles of the number of positions."""
    ordered = sorted(batches, key=positions)
    chosen = [ordered[index] for index in dict.fromkeys(round(at * (len(ordered) - 1)) for at in quantiles)]
    return sum(map(seconds, chosen)) * sum(map(positions, batches)) / sum(map(positions, chosen))


def _positions(costs: Sequence[Cost], batch: Sequence[int]) -> int:
    """Return the padded positions of the batch."""
    return len(batch) * (max(costs[item].tokens for item in batch) + max(costs[item].frames for item in batch))


def _step(trainer: Trainer, step: Sequence[int], workers: int) -> float:
    """Make an optimizer step and return its seconds, without those of tries that ran out of memory."""
    positions = share(step, 0, workers)
    [examples] = trainer.data.read("train", [positions])
    while True:
        budget, started = trainer.token_budget, time.monotonic()
        trainer.optimizer_step(step, positions, examples)
        if trainer.model.device.type == "cuda":
            torch.cuda.synchronize()
        if trainer.token_budget == budget:  # a lower budget means that a try ran out of memory: measure again
            return time.monotonic() - started
