"""Training never waits for what could have been read before, and leaves no reading behind."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.loading.prefetch import PREFETCH
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.training import trainer as train
from tests.model.trials import CONFIG, KilledError, Trial, history

TRIAL = Trial(train=CONFIG.model_copy(update={"epochs": 3, "batch_size": 2}))


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def readings() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reading"]


def is_ahead(asked: Any) -> bool:
    """As far as it may be: all batches and the mark of the end, or PREFETCH."""
    wanted = min(PREFETCH, len(asked.batches) + 1)
    return until(lambda: asked.reading._batches.qsize() == wanted)


def test_what_comes_next_is_read_before_it_is_needed(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation split during the last steps of an epoch, the next epoch's first steps during validation."""
    trainer, ready = TRIAL.trainer(models, corpus, tmp_path), []
    evaluate = train.evaluate

    def slowly(*args: Any, asked: Any, **more: Any) -> Any:
        following = trainer.begun
        ready.append(is_ahead(asked))
        found = evaluate(*args, asked=asked, **more)
        ready.append(following is None or is_ahead(following))
        return found

    monkeypatch.setattr(train, "evaluate", slowly)
    for _ in range(3):
        trainer.train_epoch()
        trainer.finish_epoch()
    assert ready == [True] * 6
    assert trainer.begun is None  # nothing comes after the last epoch


def test_time_that_is_waited_for_data_is_reported(models: Path, corpus: Shards, tmp_path: Path) -> None:
    TRIAL.run(models, corpus, tmp_path)
    reported = checkpoint.load(tmp_path / "checkpoint.pt")["progress"]["history"]
    waits = [metrics["data_wait"] for _, metrics in reported]
    assert len(waits) == 3
    assert all(0 < wait < 60 for wait in waits)
    assert waits == sorted(waits)
    assert {metrics["data_wait"] for _, metrics in history(tmp_path)} == {0}


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_trial_that_is_ended_leaves_no_reading(epoch: int, models: Path, corpus: Shards, tmp_path: Path) -> None:
    def report(number: int, metrics: dict[str, Any]) -> None:
        if number == epoch:
            raise KilledError

    with pytest.raises(KilledError):
        TRIAL.run(models, corpus, tmp_path, report)
    assert until(lambda: not readings())


def test_an_error_in_a_step_leaves_no_reading(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "answer_losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TRIAL.run(models, corpus, tmp_path)
    assert until(lambda: not readings())
