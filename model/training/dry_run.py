"""Dry steps of a trial: what its training takes of time and memory, measured in the loop itself before it starts.

A `Trainer` in a folder that is thrown away makes a step of the longest example alone, which is what no token budget
makes smaller, then two of its first epoch, the largest and the median one; and it predicts a median validation batch of
each task. How many positions they compute says what an epoch takes.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.config import TaskWeights
from data.loading.batching import Cost, micro_batches, plan, share
from model.config import TrainConfig
from model.evaluation.evaluator import Asked, ask
from model.evaluation.split_data import TrialData
from model.runtime.memory import Peak
from model.speech_llm.speech_llm import SpeechLLM
from model.training.trainer import Trainer


@dataclass(frozen=True)
class Measured:
    """What a trial takes on one of its workers."""

    train: float  # seconds of an epoch's steps
    val: float  # seconds of an evaluation
    least: int  # bytes at the peak, with one example at a time
    full: int  # bytes at the peak, with as many as train.token_budget allows
    budget: int  # tokens and frames at once that fitted: train.token_budget, or less


def measure(
    model: SpeechLLM, data: TrialData, config: TrainConfig, tasks: TaskWeights, seed: int, workers: int, peak: Peak
) -> Measured:
    """Make dry steps. The model is not to be used afterwards.

    Args:
        model: as `fit` gets it.
        data: with the splits train and val.
        config: of the training.
        tasks: weights of the model's tasks.
        seed: of the batch plan.
        workers: that share a step; the first one's part is computed.
        peak: of this process, from before the model was built.

    Raises:
        OutOfMemory: an example does not fit by itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, data, config, tasks, seed, Path(folder))
        try:
            costs = trainer.train.costs
            longest = max(range(len(costs)), key=lambda position: sum(costs[position]))
            model.train()
            _step(trainer, [longest], 1)
            least = peak.read()
            train = _epoch(trainer, workers)
            return Measured(train, _evaluation(trainer) / workers, least, peak.read(), trainer.budget)
        finally:
            data.close()


def _epoch(trainer: Trainer, workers: int) -> float:
    """Seconds of an epoch's steps."""
    size, train = trainer.config.batch_size, trainer.train
    steps = plan(train.costs, batch_size=size, seed=trainer.seed, epoch=0, weights=trainer.drawn)

    def computed(step: Sequence[int]) -> int:
        costs = [train.costs[position] for position in share(step, 0, workers)]
        return sum(
            _positions(costs, part) for part in micro_batches(costs, trainer.budget, trainer.model.pad_tolerance)
        )

    return _projected(steps, computed, lambda step: _step(trainer, step, workers), (1.0, 0.5))


def _evaluation(trainer: Trainer) -> float:
    """Seconds of an evaluation by one worker; a task's batches take what its own do."""
    model, data, val = trainer.model, trainer.data, trainer.data.splits["val"]
    asked = ask(model, data, "val", trainer.budget)
    asked.reading.close()
    batches: dict[str, list[list[int]]] = {}
    for batch in asked.batches:
        batches.setdefault(val.items[batch[0]][0], []).append(batch)

    def predict(batch: Sequence[int]) -> float:
        trainer.validation = Asked([list(batch)], data.read("val", [batch]))
        started = time.monotonic()
        trainer._validate()
        return time.monotonic() - started

    return sum(_projected(own, lambda batch: _positions(val.costs, batch), predict, (0.5,)) for own in batches.values())


def _projected(
    parts: Sequence[Sequence[int]],
    size: Callable[[Sequence[int]], int],
    seconds: Callable[[Sequence[int]], float],
    quantiles: Sequence[float],
) -> float:
    """Seconds of all parts, from those at some quantiles of the size."""
    ordered = sorted(parts, key=size)
    chosen = [ordered[place] for place in dict.fromkeys(round(at * (len(ordered) - 1)) for at in quantiles)]
    return sum(map(seconds, chosen)) * sum(map(size, parts)) / sum(map(size, chosen))


def _positions(costs: Sequence[Cost], part: Sequence[int]) -> int:
    """That are computed together, padding included."""
    return len(part) * (max(costs[item].tokens for item in part) + max(costs[item].frames for item in part))


def _step(trainer: Trainer, step: Sequence[int], workers: int) -> float:
    """Seconds of an optimizer step, with what fits into memory at once."""
    own = share(step, 0, workers)
    [examples] = trainer.data.read("train", [own])
    while True:
        budget, started = trainer.budget, time.monotonic()
        trainer._optimizer_step(step, own, examples)
        if trainer.model.device.type == "cuda":
            torch.cuda.synchronize()
        if trainer.budget == budget:  # else the time has failed tries in it
            return time.monotonic() - started
