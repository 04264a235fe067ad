"""Dry runs: what they measure, on a device with enough memory and on one without."""

import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loading.batching import plan
from data.shards.dataset import Shards
from model.config import TrainConfig
from model.runtime import memory
from model.runtime.memory import OutOfMemoryError, Peak
from model.training import dry_run, trainer
from model.training.dry_run import TrialCost, measure
from model.training.trainer import Trainer
from tests.model.test_memory import WHOLE, full_above
from tests.model.trials import TWO, Trial

MB = 10**6


def measured(
    trial: Trial,
    models: Path,
    corpus: Shards,
    workers: int = 1,
    seconds: float = math.inf,
    max_bytes: int | None = None,
) -> TrialCost:
    peak = Peak("cpu")
    model, data = trial.start(models, corpus)
    return measure(model, data, trial.train, trial.tasks, trial.seed, workers, peak, seconds, max_bytes)


def test_peak_covers_memory_that_was_freed() -> None:
    peak = Peak("cpu")
    array = np.ones(10 * MB)  # 80 MB
    del array
    highest = peak.read()
    assert highest >= memory.WORKER
    assert 60 * MB < highest - Peak("cpu").read() < 100 * MB


@pytest.mark.parametrize("quantiles", [(0.5,), (1.0, 0.5)])
def test_epoch_is_projected_from_positions(quantiles: tuple[float, ...]) -> None:
    batches = [[index] * (1 + index % 7) for index in range(40)]
    seconds = dry_run._project(batches, len, lambda batch: (3.0 * len(batch), len(batch)), quantiles)
    assert seconds == pytest.approx(3.0 * sum(map(len, batches)))


@pytest.mark.parametrize(("workers", "sizes"), [(1, [1, 9, 9]), (2, [1, 5, 5])])
def test_dry_run_makes_steps_of_the_trial(
    workers: int, sizes: list[int], models: Path, corpus: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest example alone, then the largest and the median step; a worker makes its share of them."""
    steps: list[list[int]] = []
    original = Trainer.optimizer_step

    def step(self: Trainer, whole: list[int], share: list[int], examples: list[object]) -> None:
        assert len(share) == len(examples)
        steps.append(share)
        original(self, whole, share, examples)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "optimizer_step", step)
    cost = measured(Trial(tasks=TWO, train=WHOLE), models, corpus, workers)
    assert [len(step) for step in steps] == sizes
    assert cost.train_seconds > 0 < cost.val_seconds
    assert 0.9 * memory.WORKER <= cost.min_bytes <= cost.full_bytes < memory.WORKER + 2000 * MB
    assert cost.token_budget == WHOLE.token_budget


def test_steps_are_fewer_and_shorter_when_time_is_short(
    models: Path, corpus: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest example is always computed: it shows whether a trial fits. A clock replaces the time of steps."""
    steps: list[int] = []
    now = [0.0]

    def step(self: Trainer, whole: list[int], share: list[int], examples: list[object]) -> None:
        steps.append(len(share))
        now[0] += sum(sum(self.train.costs[item]) for item in share) / 100

    monkeypatch.setattr(Trainer, "optimizer_step", step)
    monkeypatch.setattr(dry_run.time, "monotonic", lambda: now[0])
    short = TrainConfig(batch_size=9, token_budget=64)  # several micro-batches in a step
    costs = {}
    for seconds in (math.inf, 2.0, 0.0):
        steps.clear()
        costs[seconds] = (list(steps), measured(Trial(train=short), models, corpus, seconds=seconds), list(steps))
    assert costs[math.inf][2] == [1, 9, 9]
    assert costs[2.0][2][0] == 1
    assert 0 < costs[2.0][2][1] < 9
    assert len(costs[2.0][2]) < 3 or sum(costs[2.0][2]) < 19
    assert costs[0.0][2] == [1]
    for seconds in (2.0, 0.0):
        assert costs[seconds][1].train_seconds == pytest.approx(costs[math.inf][1].train_seconds, rel=0.5)


def test_smaller_budget_is_found_or_refused(models: Path, corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        full_above(patch, 4)
        assert measured(Trial(train=WHOLE), models, corpus).token_budget < WHOLE.token_budget
    full_above(monkeypatch, 0)
    with pytest.raises(OutOfMemoryError, match="one example at a time"):
        measured(Trial(train=WHOLE), models, corpus)


@pytest.mark.parametrize(("most", "max_bytes", "held"), [(99, 10**15, 9), (4, 10**15, 4), (99, 4, 4)])
def test_budget_grows_and_shrinks_to_what_fits(
    most: int, max_bytes: int, held: int, models: Path, corpus: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device runs out of memory beyond `most` examples, and an example at once takes a byte; then all is one part."""
    sizes = full_above(monkeypatch, most)

    class ExamplesAtOnce:
        device = "cpu"

        def __init__(self, device: str) -> None:
            sizes.clear()

        def read(self) -> int:
            return max(sizes)

    monkeypatch.setattr(dry_run, "Peak", ExamplesAtOnce)
    trial = Trial(train=WHOLE.model_copy(update={"token_budget": 120}))
    cost = measured(trial, models, corpus, max_bytes=max_bytes)
    assert cost.full_bytes <= held
    model, data = trial.start(models, corpus)
    costs = data.splits["train"].costs
    steps = plan(costs, batch_size=9, seed=trial.seed, epoch=0)
    step = max(([costs[item] for item in step] for step in steps), key=lambda step: sum(map(sum, step)))
    found, doubled = ([*map(len, model.micro_batches(step, times * cost.token_budget))] for times in (1, 2))
    assert max(found) <= held
    assert max(doubled) > held or doubled == found


def test_allocator_failure_is_out_of_memory(models: Path, corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system gives this process only 100 MB more, and every example needs 200 MB."""
    original = trainer.answer_losses

    def compute(*args: object) -> object:
        torch.ones(200 * MB // 4).sum()
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "answer_losses", compute)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100 * MB, limits[1]))
    try:
        with pytest.raises(OutOfMemoryError, match="one example at a time"):
            measured(Trial(train=WHOLE), models, corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
