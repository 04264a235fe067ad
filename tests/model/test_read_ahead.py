"""Training reads ahead what it needs next, and leaves no reading thread behind."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.loading.prefetch import PREFETCH
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.training import trainer as training
from tests.model.trials import CONFIG, KilledError, Trial

TRIAL = Trial(train=CONFIG.model_copy(update={"batch_size": 2}))


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition, at most 5 s."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def is_ahead(pending: Any) -> bool:
    """Return whether as much is read as may be: all batches and the mark of the end, or PREFETCH."""
    wanted = min(PREFETCH, len(pending.batches) + 1)
    return until(lambda: pending.reader._batches.qsize() == wanted)


def no_thread_reads() -> bool:
    return until(lambda: not any(thread.name == "reading" for thread in threading.enumerate()))


def test_next_batches_are_read_before_they_are_needed(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation split during the last steps of an epoch, the next epoch's first steps during validation."""
    trainer, ready = TRIAL.trainer(models, corpus, tmp_path), []
    evaluate = training.evaluate

    def slowly(*args: Any, pending: Any, **more: Any) -> Any:
        following = trainer.next_steps
        ready.append(is_ahead(pending))
        records = evaluate(*args, pending=pending, **more)
        ready.append(following is None or is_ahead(following))
        return records

    monkeypatch.setattr(training, "evaluate", slowly)
    for _ in range(2):
        trainer.train_epoch()
        trainer.finish_epoch()
    assert ready == [True] * 4
    assert trainer.next_steps is None  # nothing comes after the last epoch
    waits = [metrics["data_wait"] for _, metrics in checkpoint.load(tmp_path / checkpoint.FILE)["progress"]["history"]]
    assert 0 < waits[0] <= waits[1] < 60


@pytest.mark.parametrize("epoch", [1, 2])
def test_ended_trial_leaves_no_reading_thread(epoch: int, models: Path, corpus: Shards, tmp_path: Path) -> None:
    def report(number: int, metrics: dict[str, Any]) -> None:
        if number == epoch:
            raise KilledError

    with pytest.raises(KilledError):
        TRIAL.run(models, corpus, tmp_path, report)
    assert no_thread_reads()


def test_failed_step_leaves_no_reading_thread(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "answer_losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TRIAL.run(models, corpus, tmp_path)
    assert no_thread_reads()
