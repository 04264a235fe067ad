"""Dry run of a trial: the time and memory of its training, measured by the training loop itself before it starts.

A `Trainer` in a temporary folder trains on the longest example alone, which no token budget can make cheaper, and then
makes two steps of its first epoch, the largest one and the median one. It also predicts a median validation batch of
each task. The time of an epoch is projected from the number of positions in these batches. Where time is short, the
steps are cut to as many of their micro-batches as it allows, and then left out; the longest example is always computed.

With `train.token_budget: auto` on a GPU, the largest step is repeated with twice the token budget until it is computed
at once or takes too much memory.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from data.config import TaskWeights
from data.loading.batching import plan, share
from model.config import TrainConfig
from model.evaluation.evaluator import PendingBatches, request_batches
from model.evaluation.split_data import TrialData
from model.runtime.memory import Peak
from model.speech_llm.speech_llm import SpeechLLM
from model.training.trainer import Trainer


class TimeLimit:
    """The time that the steps of a dry run may take, and how fast they are.

    Args:
        seconds: that are left; infinity: no limit.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.rate = 0.0  # seconds for a position, by the last step
        self.reached = False  # whether something was left out

    def left(self) -> float:
        """Return the seconds that are left, which may be negative."""
        return self.end - time.monotonic()

    def shortened(self, parts: Sequence[list[int]], positions: Callable[[list[int]], int]) -> list[int]:
        """Return the items of as many parts as the time allows by the last rate, and of the first one in any case.

        Args:
            parts: micro-batches of a step.
            positions: the padded positions of a part.
        """
        items, seconds = list(parts[0]), self.rate * positions(parts[0])
        for part in parts[1:]:
            seconds += self.rate * positions(part)
            if seconds > self.left():
                self.reached = True
                break
            items += part
        return items


NO_LIMIT = TimeLimit(math.inf)


class TrialCost(BaseModel):
    """Time and memory of a trial on one of its workers. Files contain the aliases."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)
    train_seconds: float = Field(alias="train", description="Seconds of the optimizer steps of an epoch.")
    val_seconds: float = Field(alias="val", description="Seconds of an evaluation.")
    min_bytes: int = Field(alias="least", description="Peak memory with one example at a time.")
    full_bytes: int = Field(alias="full", description="Peak memory with as many examples as train.token_budget allows.")
    token_budget: int = Field(alias="budget", description="Tokens and frames at once that fit.")
    extrapolated: bool = Field(
        False, description="Whether time was short, so that the seconds are those of fewer steps."
    )


def measure(
    model: SpeechLLM,
    data: TrialData,
    config: TrainConfig,
    tasks: TaskWeights,
    seed: int,
    workers: int,
    peak: Peak,
    seconds: float = math.inf,
    max_bytes: int | None = None,
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
        seconds: that the steps may take.
        max_bytes: memory up to which the token budget grows; None: it is that of the configuration.

    Raises:
        OutOfMemoryError: one example alone does not fit.
    """
    limit = TimeLimit(seconds)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, data, config, tasks, seed, Path(folder))
        try:
            costs = trainer.train.costs
            longest = max(range(len(costs)), key=lambda position: sum(costs[position]))
            model.train()
            limit.rate = _step(trainer, [longest], 1) / _positions(trainer, "train", [longest])
            min_bytes = peak.read()
            if max_bytes is not None:
                peak = _find_token_budget(trainer, workers, peak.device, limit, max_bytes)
            train_seconds = _measure_epoch(trainer, workers, limit)
            val_seconds = _measure_evaluation(trainer, limit) / workers
            return TrialCost(
                train_seconds=train_seconds,
                val_seconds=val_seconds,
                min_bytes=min_bytes,
                full_bytes=peak.read(),
                token_budget=trainer.token_budget,
                extrapolated=limit.reached,
            )
        finally:
            data.close()


def _find_token_budget(trainer: Trainer, workers: int, device: str, limit: TimeLimit, max_bytes: int) -> Peak:
    """Set the largest token budget with which the largest step of the first epoch stays below `max_bytes`.

    The budget is doubled as long as that changes how the step is cut, and the time allows; it is halved as long as the
    step does not fit, down to one example at a time.

    Returns:
        The peak memory from the step with this budget on.
    """

    def parts(budget: int) -> list[list[int]]:
        return _micro_batches(trainer, own, budget)

    own = max((share(step, 0, workers) for step in _first_epoch(trainer)), key=lambda own: _computed(trainer, own))
    fitting, budget, failing, peak = 0, trainer.token_budget, math.inf, Peak(device)
    while limit.left() > 0:
        trainer.token_budget, peak = budget, Peak(device)
        _step(trainer, own, 1)
        if trainer.token_budget == budget and peak.read() <= max_bytes:
            fitting, budget = budget, 2 * budget
            if budget >= failing or parts(budget) == parts(fitting):
                break
        elif fitting or len(parts(budget)) == len(own):
            break
        else:
            failing, budget = budget, min(trainer.token_budget, budget // 2)
    else:
        limit.reached = True
    if fitting and trainer.token_budget != fitting:
        trainer.token_budget, peak = fitting, Peak(device)
    return peak


def _first_epoch(trainer: Trainer) -> list[list[int]]:
    size, weights = trainer.config.batch_size, trainer.sampling_weights
    return plan(trainer.train.costs, batch_size=size, seed=trainer.seed, epoch=0, weights=weights)


def _micro_batches(trainer: Trainer, items: Sequence[int], budget: int) -> list[list[int]]:
    """Return the items of each micro-batch of a worker's part of a step."""
    found = trainer.model.micro_batches([trainer.train.costs[item] for item in items], budget)
    return [[items[index] for index in part] for part in found]


def _computed(trainer: Trainer, items: Sequence[int]) -> int:
    """Return the positions of a worker's part of a step, padding included."""
    return sum(_positions(trainer, "train", part) for part in _micro_batches(trainer, items, trainer.token_budget))


def _measure_epoch(trainer: Trainer, workers: int, limit: TimeLimit) -> float:
    """Return the projected seconds of the optimizer steps of an epoch."""
    steps = _first_epoch(trainer)

    def positions(step: Sequence[int]) -> int:
        return _computed(trainer, share(step, 0, workers))

    def measured(step: Sequence[int]) -> tuple[float, int]:
        """Make the step, or as much of it as time allows; return its seconds and its positions."""
        own = share(step, 0, workers)
        parts = _micro_batches(trainer, own, trainer.token_budget)
        items = limit.shortened(parts, lambda part: _positions(trainer, "train", part))
        whole = len(items) == len(own)
        taken = _step(trainer, step, workers) if whole else _step(trainer, items, 1)
        return taken, _computed(trainer, items)

    if limit.left() <= 0:  # the longest example took all the time
        limit.reached = True
        return limit.rate * sum(map(positions, steps))
    return _project(steps, positions, measured, (1.0, 0.5), limit)


def _measure_evaluation(trainer: Trainer, limit: TimeLimit) -> float:
    """Return the projected seconds of an evaluation by one worker, projected for each task separately."""
    model, data, val = trainer.model, trainer.data, trainer.data.splits["val"]
    pending = request_batches(model, data, "val", trainer.token_budget)
    pending.reader.close()
    by_task: dict[str, list[list[int]]] = {}
    for batch in pending.batches:
        by_task.setdefault(val.items[batch[0]][0], []).append(batch)

    def predict(batch: Sequence[int]) -> tuple[float, int]:
        batch = limit.shortened([[item] for item in batch], lambda part: _positions(trainer, "val", part))
        trainer.validation = PendingBatches([list(batch)], data.read("val", [batch]))
        started = time.monotonic()
        trainer.validate()
        return time.monotonic() - started, _positions(trainer, "val", batch)

    return sum(
        _project(batches, lambda batch: _positions(trainer, "val", batch), predict, (0.5,), limit)
        for batches in by_task.values()
    )


def _project(
    batches: Sequence[Sequence[int]],
    positions: Callable[[Sequence[int]], int],
    measured: Callable[[Sequence[int]], tuple[float, int]],
    quantiles: Sequence[float],
    limit: TimeLimit = NO_LIMIT,
) -> float:
    """Return the seconds of all batches, projected from the batches at some quantiles of the number of positions.

    Args:
        batches: of an epoch.
        positions: the padded positions of a batch.
        measured: computes a batch or a part of it, and returns its seconds and positions.
        quantiles: in the order in which they are measured; the first one is measured in any case.
        limit: of the time.
    """
    ordered = sorted(batches, key=positions)
    seconds, count = 0.0, 0
    for index in dict.fromkeys(round(at * (len(ordered) - 1)) for at in quantiles):
        if count and limit.left() <= 0:
            limit.reached = True
            break
        taken, computed = measured(ordered[index])
        limit.rate = taken / computed
        seconds, count = seconds + taken, count + computed
    return seconds * sum(map(positions, batches)) / count


def _positions(trainer: Trainer, split: str, batch: Sequence[int]) -> int:
    """Return the positions of the batch, padding included."""
    costs = trainer.data.splits[split].costs
    return trainer.model.count_computed([costs[item] for item in batch])


def _step(trainer: Trainer, step: Sequence[int], workers: int) -> float:
    """Make an optimizer step and return its seconds, without those of compiling and of tries that ran out of memory."""
    positions = share(step, 0, workers)
    [examples] = trainer.data.read("train", [positions])
    if trainer.config.compile == "on":
        trainer.optimizer_step(step, positions, examples)
    while True:
        budget, started = trainer.token_budget, time.monotonic()
        trainer.optimizer_step(step, positions, examples)
        if trainer.model.device.type == "cuda":
            torch.cuda.synchronize()
        if trainer.token_budget == budget:  # a lower budget means that a try ran out of memory: measure again
            return time.monotonic() - started
