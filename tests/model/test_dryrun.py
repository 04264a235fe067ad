"""Dry steps: what they measure, on a device with enough memory and on one without."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from data.shards.dataset import Shards
from model.runtime import memory
from model.runtime.memory import OutOfMemoryError, Peak
from model.training import dry_run as dryrun
from model.training import trainer as train
from model.training.dry_run import Measured, measure
from model.training.trainer import Trainer
from tests.model.test_memory import WHOLE, full_above
from tests.model.trials import TWO, Trial

MB = 10**6


def dry(trial: Trial, models: Path, corpus: Shards, workers: int = 1) -> Measured:
    peak = Peak("cpu")
    model, data = trial.start(models, corpus)
    return measure(model, data, trial.train, trial.tasks, trial.seed, workers, peak)


@contextmanager
def limited(more: int) -> Iterator[None]:
    """A process that may have so many bytes more than now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_the_peak_is_what_was_held_at_a_time() -> None:
    peak = Peak("cpu")
    held = np.ones(25 * MB)  # 200 MB
    del held
    highest = peak.read()
    assert highest >= memory.WORKER
    assert 180 * MB < highest - Peak("cpu").read() < 220 * MB


def test_an_epoch_is_projected_from_the_positions_that_are_computed() -> None:
    parts = [[place] * (1 + place % 7) for place in range(40)]
    for quantiles in ((0.5,), (1.0, 0.5)):
        found = dryrun._projected(parts, len, lambda part: 3.0 * len(part), quantiles)
        assert found == pytest.approx(3.0 * sum(map(len, parts)))


def test_the_steps_are_those_of_the_trial(models: Path, corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest example alone, then the largest and the median step; with two workers, a half of these."""
    taken: list[list[int]] = []
    original = Trainer._optimizer_step

    def step(self: Trainer, whole: list[int], own: list[int], examples: list[object]) -> None:
        assert len(own) == len(examples)
        taken.append(own)
        original(self, whole, own, examples)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    found = dry(Trial(tasks=TWO, train=WHOLE), models, corpus)
    assert [len(own) for own in taken] == [1, 9, 9]
    assert found.train > 0 < found.val
    assert memory.WORKER <= found.least <= found.full < memory.WORKER + 2000 * MB
    assert found.budget == WHOLE.token_budget
    taken.clear()
    dry(Trial(tasks=TWO, train=WHOLE), models, corpus, workers=2)
    assert [len(own) for own in taken] == [1, 5, 5]


def test_less_at_once_is_noted_and_nothing_at_all_is_an_error(
    models: Path, corpus: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_above(patch, 2)
        assert dry(Trial(train=WHOLE), models, corpus).budget < WHOLE.token_budget
    full_above(monkeypatch, 0)
    with pytest.raises(OutOfMemoryError, match="one example at a time"):
        dry(Trial(train=WHOLE), models, corpus)


def test_a_process_without_memory_is_recognised(models: Path, corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own words, when the system gives no more: nothing is simulated but the size of the example."""
    original = train.answer_losses

    def compute(*args: object) -> object:
        torch.ones(200 * MB // 4).sum()
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "answer_losses", compute)
    dry(Trial(train=WHOLE), models, corpus)
    with limited(100 * MB), pytest.raises(OutOfMemoryError, match="one example at a time"):
        dry(Trial(train=WHOLE), models, corpus)
