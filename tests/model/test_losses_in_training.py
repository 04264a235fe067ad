"""Losses in training: a step minimises what the settings say, whatever its micro-batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

from data.config import DataConfig, TaskWeights
from data.errors import ConfigError, DataError
from data.loading.examples import Example
from data.loading.tasks import answer_sets
from data.shards.dataset import Shards
from model.config import LossConfig, TrainConfig
from model.evaluation.split_data import TrialData
from model.objectives.losses import Losses, answer_losses
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from model.training.trainer import Trainer
from tests.model.common import build, close, settings
from tests.model.losses import ALL, counted, mixed, student_rows

FROZEN_LLM = {"trainable": "adapter+tokens", "lora": {"enabled": False}}


def gradients(model: SpeechLLM, losses: Losses, config: LossConfig) -> dict[str, Tensor]:
    model.zero_grad()
    losses.weighted_sum(config).sum().backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize(
    "changed",
    [FROZEN_LLM, {"trainable": "encoder+adapter+lora+tokens+llm"}],
    ids=["frozen-llm", "all"],
)
def test_gradient_checkpointing_changes_memory_only(
    changed: dict[str, Any], models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass computes activations again, also through an LLM that is frozen."""
    llm = {"path": str(models / "llm")}
    calls = counted(monkeypatch, LlamaAttention)
    results = []
    for checkpointing, recomputed in ((False, 0), (True, 2), (1, 1)):
        model = build(models, "whisper", llm=llm | {"gradient_checkpointing": checkpointing}, **changed).train()
        calls.clear()
        losses = answer_losses(model, mixed(examples), LossConfig())
        assert len(calls) == 2
        results.append((losses.next_token_B.detach(), gradients(model, losses, LossConfig())))
        assert len(calls) == 2 + recomputed
    (first_B, gradient), *others = results
    scale = max(tensor.abs().max() for tensor in gradient.values())
    for second_B, again in others:
        assert close(first_B, second_B, 1e-6)
        assert gradient.keys() == again.keys()
        assert all((tensor - again[name]).abs().max() <= 1e-6 * scale for name, tensor in gradient.items())


def test_more_layers_than_the_llm_has_are_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.llm\.gradient_checkpointing: 3 layers, and .* has 2; lower it, or"):
        build(models, llm={"gradient_checkpointing": 3})


Setup = tuple[Trainer, list[int], list[Example]]


def trainer(models: Path, corpus: Shards, folder: Path, tasks: TaskWeights, **changed: Any) -> Setup:
    """A trainer before a step over 12 items of all tasks."""
    seed_everything(0)
    model = SpeechLLM(settings(models, "whisper", trainable="adapter+lora+tokens"), answer_sets(corpus, tasks.active()))
    data = TrialData.open(corpus, model, DataConfig(history=2), ("train", "val"))
    config = TrainConfig(batch_size=12, max_grad_norm=1e9, **changed)
    made = Trainer(model, data, config, tasks, 0, folder)
    model.train()
    last = len(data.splits["train"].items) - 1
    step = [index * last // 11 for index in range(12)]
    return made, step, next(data.read("train", [step]))


def expected_objective(setup: Setup, weigh: Callable[[str], float]) -> Tensor:
    """Sum over tasks of weight x mean over tokens; a token counts as `weigh` returns for its item's label."""
    made, _, examples = setup
    total = torch.zeros(())
    for task, weight in made.task_weights.items():
        nll, shares = [], []
        for example in (example for example in examples if example.task == task):
            logits, _, targets = student_rows(made.model, example)
            nll.append(F.cross_entropy(logits, targets, reduction="none"))
            shares.append(torch.full((len(targets),), weigh(example.answer)))
        total = total + weight * (torch.cat(nll) * torch.cat(shares)).mean()
    return total


def minimised(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> tuple[float, Tensor]:
    """The loss and the gradient of an optimizer step that is not made."""
    made, step, examples = setup
    results: list[float] = []
    monkeypatch.setattr(made, "_record_step", lambda noted: results.append(float(noted.total)))
    monkeypatch.setattr(made.optimizer, "zero_grad", lambda set_to_none: None)
    monkeypatch.setattr(made.optimizer, "step", lambda: None)
    made.optimizer_step(step, step, examples)
    return results[0], torch.cat([parameter.grad.flatten() for parameter in made.parameters])


def gradient_of(setup: Setup, objective: Tensor) -> Tensor:
    parameters = setup[0].parameters
    grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(parameter) if grad is None else grad).flatten() for parameter, grad in pairs])


FOUR = TaskWeights(classify=0.3, forecast=1.0, response=1.5, quality=0.7)


@pytest.mark.parametrize(
    ("tasks", "budget"),
    [(TaskWeights(classify=2.0), 400), (TaskWeights(classify=2.0, response=0.5), 10**6), (FOUR, 1), (FOUR, 400)],
    ids=["one", "two", "four-single", "four"],
)
def test_step_minimises_the_weighted_mean_of_each_task(
    tasks: TaskWeights, budget: int, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = trainer(models, corpus, tmp_path, tasks, token_budget=budget)
    assert {example.task for example in setup[2]} == set(tasks.active())
    objective = expected_objective(setup, lambda label: 1.0)
    loss, gradient = minimised(setup, monkeypatch)
    assert loss == pytest.approx(objective.item(), rel=1e-5)
    assert close(gradient, gradient_of(setup, objective), 1e-4)


def test_class_weights_equal_those_of_scikit_learn(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not part of the divisor: they would cancel in a step of one item."""
    setup = trainer(models, corpus, tmp_path, TaskWeights(classify=1.0, response=2.0), class_weights="balanced")
    split = setup[0].data.splits["train"]
    truth = [answer for (task, _), answer in zip(split.items, split.answers, strict=True) if task == "classify"]
    names = np.unique(truth)
    weights = dict(zip(names, compute_class_weight("balanced", classes=names, y=truth), strict=True))
    assert len(set(weights.values())) > 1
    objective = expected_objective(setup, lambda label: float(weights.get(label, 1.0)))
    loss, gradient = minimised(setup, monkeypatch)
    assert loss == pytest.approx(objective.item(), rel=1e-5)
    assert close(gradient, gradient_of(setup, objective), 1e-4)
    plain = expected_objective(setup, lambda label: 1.0)
    assert abs(plain.item() - loss) > 1e-4


def test_step_minimises_auxiliary_losses_too(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = trainer(models, corpus, tmp_path, TaskWeights(), losses=ALL)
    made, _, examples = setup
    losses = answer_losses(made.model, examples, ALL)
    loss, gradient = minimised(setup, monkeypatch)
    objective = losses.weighted_sum(ALL).sum() / sum(losses.count_B)
    assert loss == pytest.approx(objective.item(), rel=1e-5)
    assert close(gradient, gradient_of(setup, objective), 1e-4)


def test_transcript_too_long_for_the_teacher_is_refused(models: Path, corpus: Shards) -> None:
    """Only the teacher reads the text of an audio turn."""
    model = SpeechLLM(settings(models, modality="speech"), answer_sets(corpus, ["classify"]), "meta")
    plain = TrialData.open(corpus, model, DataConfig(history=2), ("train",))
    taught = TrialData.open(corpus, model, DataConfig(history=2), ("train",), teacher=True)
    assert taught.splits["train"].costs == plain.splits["train"].costs  # it reads one example at a time, or has read it
    model.max_positions = 20
    with pytest.raises(DataError, match=r"utterance c\d+/\d+: .* reads 20 at once"):
        TrialData.open(corpus, model, DataConfig(history=2), ("train",), teacher=True)
