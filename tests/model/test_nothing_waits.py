"""A step does not wait for the device, inputs are copied ahead of it, and checkpoints are written beside it."""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data.errors import StorageError
from data.loading.examples import Example
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.runtime import device as device_module
from model.runtime.device import uploaded
from model.speech_llm.packing import set_packing
from model.training import checkpoint_writer
from model.training import trainer as training
from model.training.trainer import Trainer
from tests.model.trials import CONFIG, TWO, KilledError, Trial, kill_after, same_end

# What an encoder does: Whisper's spectrogram is made on the host, and HuBERT looks whether there is padding.
EXEMPT = {
    "whisper": "numpy in _torch_extract_fbank_features",
    "hubert-group": "__bool__ in _ignore_bidirectional_mask_sdpa",
}
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")


class CountReads(TorchFunctionMode):
    """Counts calls that return the values of tensors to the host: each waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(function, "__name__", "")) in READS:
            self.found[f"{name} in {sys._getframe(1).f_code.co_name}"] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "packs"), [("whisper", True), ("hubert-group", False)])
def test_only_a_logged_step_waits_for_the_device(
    kind: str, packs: bool, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One encoder is frozen, and the other one trains."""
    changed = {"trainable": "encoder+adapter+lora+tokens"} if kind == "hubert-group" else {}
    trainer = Trial(kind, changed, tasks=TWO).trainer(models, corpus, tmp_path)
    set_packing(trainer.model.llm, packs)
    monkeypatch.setattr(training, "LOG_EVERY", 3)
    waits = []
    original = Trainer.optimizer_step

    def step(self: Trainer, *args: Any) -> None:
        with CountReads() as counter:
            original(self, *args)
        waits.append(counter.found)

    monkeypatch.setattr(Trainer, "optimizer_step", step)
    trainer.train_epoch()
    for number, found in enumerate(waits, 1):
        assert (found.keys() - {EXEMPT[kind]} == set()) == (number % 3 > 0), found
    assert len(waits) > 3


def test_features_are_copied_two_batches_ahead_on_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here: stand-ins record what is asked of one."""
    log: list[str] = []
    stream = SimpleNamespace(record_event=lambda: "event", wait_event=lambda event: log.append(f"wait for {event}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append(f"use {int(self[0])}"))
    monkeypatch.setattr(device_module, "on_device", lambda values, device: torch.tensor(values))
    example = Example("a", "classify", "c", "client", "x", None, (), None, None)

    def batches() -> Iterator[list[Example]]:
        for number in range(4):
            log.append(f"read {number}")
            yield [replace(example, features=(np.array([number]),))]

    for [read] in uploaded(batches(), torch.device("cuda")):
        assert read.features is not None
        log.append(f"step {int(read.features[0][0])}")
    steps = [["wait for event", f"use {number}", f"step {number}"] for number in range(4)]
    first = ["read 0", "read 1", "read 2", *steps[0], "read 3", *steps[1]]
    assert log == [*first, *steps[2], *steps[3]]
    [batch] = uploaded(iter([[example]]), torch.device("cpu"))
    assert batch[0] is example


class SlowWriter:
    """Lets checkpoints be written only once `go` is set, and keeps what happens."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go, self.written = threading.Event(), list[int]()
        save = checkpoint.save

        def slowly(path: Path, state: Any, lock: Any) -> None:
            assert self.go.wait(10)
            save(path, state, lock)
            self.written.append(state["progress"]["total_steps"])

        patch.setattr(checkpoint, "save", slowly)


FREQUENT = Trial(train=CONFIG.model_copy(update={"checkpoint_steps": 2, "epochs": 1}))


def test_steps_continue_while_a_checkpoint_is_written(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint holds the step at which it was started, and a training that continues from it ends alike."""
    FREQUENT.run(models, corpus, tmp_path / "whole")
    with monkeypatch.context() as patch:
        writer, trainer = SlowWriter(patch), FREQUENT.trainer(models, corpus, tmp_path / "killed")
        kill_after(patch, 3)
        with pytest.raises(KilledError):
            trainer.train_epoch()
        assert (trainer.progress.total_steps, writer.written) == (3, [])
        writer.go.set()
        trainer.writer.close()
        assert writer.written == [2]
    FREQUENT.run(models, corpus, tmp_path / "killed")
    assert same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("copied", [True, pytest.param(False, marks=pytest.mark.long)])
def test_reported_epoch_is_in_a_complete_checkpoint(
    copied: bool, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SlowWriter(monkeypatch)
    threading.Timer(0.3, writer.go.set).start()
    monkeypatch.setattr(checkpoint_writer, "MAX_COPY", 2**30 if copied else 0)

    def report(epoch: int, metrics: dict[str, Any]) -> None:
        assert checkpoint.load(tmp_path / checkpoint.FILE)["progress"]["epoch"] == epoch
        assert writer.written[-1] == metrics["steps"]

    FREQUENT.run(models, corpus, tmp_path, report)


def test_checkpoint_that_cannot_be_written_ends_the_training(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(StorageError, match="no space left"):
        FREQUENT.run(models, corpus, tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
