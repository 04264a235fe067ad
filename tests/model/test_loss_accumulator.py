"""No step waits for the device; a step that is not finite is skipped, and reported when its numbers are read."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from data.shards.dataset import Shards
from model.checkpoints.checkpoint import trained_tensors
from model.checkpoints.fingerprint import digest
from model.config import LossConfig
from model.speech_llm.speech_llm import SpeechLLM
from model.training.loss_accumulator import LossAccumulator, NonFiniteError
from model.training.trainer import LOG_EVERY
from tests.model.trials import CONFIG, TWO, Trial


def test_steps_need_no_value_from_the_device(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where reading a value, or how many there are, is an error.

    transformers itself reads one: whether positions are those of packed sequences, once in a forward pass.
    """
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    trial = Trial(tasks=TWO, model={"modality": "text+speech"})
    trainer = trial.trainer(models, corpus, tmp_path)
    model = trainer.model = SpeechLLM(trial.config(models), trainer.model.tasks, device="meta").train()
    trainer.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer.losses = LossAccumulator(list(model.tasks), LossConfig(), model.device)
    trainer.non_finite = torch.zeros((), device="meta")
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # torch has no fused kind there,
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)  # nor mixed precision
    features = np.zeros((9, model.encoder.width), np.float16)
    for step in [[0, 1, 2], [3, 4, 5], [6, 7, 8]]:
        (examples,) = trainer.data.read("train", [step])
        trainer.optimizer_step(step, step, [replace(example, features=(features,)) for example in examples])
    assert len(trainer.losses.unread) == 3 < LOG_EVERY
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.losses.read({})


def test_no_step_follows_one_that_is_not_finite(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Though the gradients of later ones are finite; and no checkpoint has them."""
    trainer = Trial(train=CONFIG.model_copy(update={"warmup": 0.0})).trainer(models, corpus, tmp_path)

    def explode(gradient: Tensor) -> Tensor:
        return gradient * (float("inf") if trainer.progress.total_steps == 2 else 1.0)

    trainer.model.cls.register_hook(explode)
    trainer.model.train()
    weights = []
    for step in [[index, index + 1] for index in range(5)]:
        (examples,) = trainer.data.read("train", [step])
        trainer.optimizer_step(step, step, examples)
        weights.append(digest(trained_tensors(trainer.model)))
    assert weights[0] != weights[1]
    assert set(weights[1:]) == {weights[1]}
    with pytest.raises(NonFiniteError, match=r"^non-finite gradient at step 3, learning rate"):
        trainer.save()
    assert not trainer.folder.checkpoint_path.exists()
