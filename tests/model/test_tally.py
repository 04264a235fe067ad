"""No step waits for the device; what is not sound is not made, and is told when the numbers are read."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from data.shards.dataset import Shards
from model.checkpoints.checkpoint import digest, trained_tensors
from model.config import LossConfig
from model.speech_llm.speech_llm import SpeechLLM
from model.training.loss_accumulator import LossAccumulator, NonFiniteError
from model.training.trainer import LOG_EVERY
from tests.model.trials import CONFIG, TWO, Trial


def test_steps_are_made_where_no_number_can_be_read(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that knows shapes alone: whoever asks it for a number, or for how many there are, gets an error.

    One look of transformers' own is left: whether positions are those of packed sequences, once a forward pass.
    """
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    trial = Trial(tasks=TWO, model={"modality": "text+speech"})
    made = trial.trainer(models, corpus, tmp_path)
    model = made.model = SpeechLLM(trial.config(models), made.model.tasks, device="meta").train()
    made.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made.tally, made.found_inf = (
        LossAccumulator(list(model.tasks), LossConfig(), model.device),
        torch.zeros((), device="meta"),
    )
    monkeypatch.setattr(made.optimizer, "step", lambda: None)  # torch has none of a fused kind there,
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)  # nor mixed precision
    assert model.encoder is not None
    features = np.zeros((9, model.encoder.width), np.float16)
    for step in [[0, 1, 2], [3, 4, 5], [6, 7, 8]]:
        (examples,) = made.data.read("train", [step])
        heard = [replace(example, features=features) for example in examples]
        made._optimizer_step(step, step, heard)
    assert len(made.tally.unread) == 3 < LOG_EVERY
    with pytest.raises((RuntimeError, NotImplementedError)):
        made.tally.read({})


def test_no_step_is_made_after_one_that_is_not_sound(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Though their own gradients are finite; and no checkpoint is written of them."""
    made = Trial(train=CONFIG.model_copy(update={"warmup": 0.0})).trainer(models, corpus, tmp_path)

    def explode(gradient: Tensor) -> Tensor:
        return gradient * (float("inf") if made.state.total_steps == 2 else 1.0)

    assert made.model.cls is not None
    made.model.cls.register_hook(explode)
    made.model.train()
    weights = []
    for step in [[place, place + 1] for place in range(5)]:
        (examples,) = made.data.read("train", [step])
        made._optimizer_step(step, step, examples)
        weights.append(digest(trained_tensors(made.model)))
    assert weights[0] != weights[1]
    assert set(weights[1:]) == {weights[1]}
    with pytest.raises(NonFiniteError, match=r"^non-finite gradient at step 3, learning rate"):
        made.save()
    assert not made.path.exists()
