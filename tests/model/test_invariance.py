"""The same number at any batch size, order and padding: every stage of the model, in fp32, to a relative 1e-5.

The reference is each example computed alone. `test_mutations.py` puts back the faults that are known to break this, one
at a time, and shows that these tests notice.
"""

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.config import DataConfig, TaskWeights
from data.loading.batching import share
from data.loading.examples import Example
from data.loading.tasks import answer_sets
from data.shards.dataset import Shards
from model.config import LossConfig, TrainConfig
from model.evaluation.evaluator import evaluate
from model.evaluation.metrics import summarise
from model.evaluation.scoring import generate, label_scores
from model.evaluation.split_data import TrialData
from model.objectives.losses import answer_losses
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from model.training.trainer import Trainer
from tests.conftest import ENCODERS
from tests.model.common import as_two_workers, build, close, replies, settings

SIZES = (1, 2, 3, 8)
ORDERS: dict[str, list[int]] = {
    "given": list(range(8)),
    "reversed": list(range(8))[::-1],
    "shuffled": np.random.default_rng(1).permutation(8).tolist(),
}
LOSSES = LossConfig(distillation=0.5, temperature=2.0, hidden=0.5)
TASKS = TaskWeights(classify=1.0, forecast=0.5, response=0.3)
Compute = Callable[[list[Example]], Sequence[Any]]


def batches(items: Sequence[Any], size: int, order: Sequence[int]) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(items), size)]


def by_example(compute: Compute, examples: list[Example], size: int, order: list[int]) -> list[Any]:
    found: dict[int, Any] = {}
    for batch in batches(examples, size, order):
        found |= dict(zip(batch, compute([examples[place] for place in batch]), strict=True))
    return [found[place] for place in range(len(examples))]


def losses(model: SpeechLLM, part: list[Example]) -> list[Tensor]:
    return list(torch.stack(list(answer_losses(model, part, LOSSES).by_name().values()), dim=1))


STAGES: dict[str, Callable[[SpeechLLM], Compute]] = {
    "clips": lambda model: model.clips,
    "prompts": lambda model: model.prompts,
    "scores": lambda model: lambda part: list(label_scores(model, part)),
    "losses": lambda model: lambda part: losses(model, part),
    "losses of replies": lambda model: lambda part: losses(model, replies(part)),
}


@torch.no_grad()
def check_stage(stage: str, model: SpeechLLM, examples: list[Example], tolerance: float = 1e-5) -> None:
    compute = STAGES[stage](model)
    alone = by_example(compute, examples, 1, ORDERS["given"])
    for size in SIZES:
        for order in ORDERS.values():
            for one, other in zip(by_example(compute, examples, size, order), alone, strict=True):
                assert one.shape == other.shape
                assert close(one, other, tolerance)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_each_stage_depends_on_its_own_example_only(
    kind: str, stage: str, models: Path, examples: list[Example]
) -> None:
    check_stage(stage, build(models, kind), examples)


VARIANTS: dict[str, dict[str, Any]] = {
    "text": {"modality": "text"},
    "speech": {"modality": "speech", "cls": "after"},
    "sound before words": {"prompt": {"order": "sound-text"}, "cls": "none"},
    "stacked frames, MLP": {"adapter": {"kind": "stack", "window": 4, "stride": 4, "hidden": 16}},
    "convolution": {"adapter": {"kind": "conv", "window": 5, "stride": 3}},
    "DoRA": {"lora": {"rank": 2, "dora": True, "dropout": 0.0}},
    "encoder frozen": {"trainable": "adapter+lora+tokens"},
    "LoRA off": {"lora": {"enabled": False}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_depends_on_its_own_example_only(variant: str, models: Path, examples: list[Example]) -> None:
    model = build(models, **VARIANTS[variant])
    for stage in ("scores", "losses of replies"):
        check_stage(stage, model, examples)


@pytest.mark.parametrize("kind", ["hubert-group", "whisper"])
def test_layers_above_frozen_ones_depend_on_their_own_example_only(
    kind: str, models: Path, examples: list[Example]
) -> None:
    model = build(models, kind, trainable="encoder.*.layers.1.*+adapter+lora+tokens")
    assert model.frozen_layers == 1
    check_stage("clips", model, examples)


def test_generated_texts_depend_on_their_own_example_only(models: Path, examples: list[Example]) -> None:
    model = build(models)
    alone = by_example(lambda part: generate(model, part), replies(examples), 1, ORDERS["given"])
    assert len({reply.text for reply in alone}) > 1
    for size in SIZES:
        for order in ORDERS.values():
            assert by_example(lambda part: generate(model, part), replies(examples), size, order) == alone


@pytest.mark.parametrize("batch_size", [2, 3, 5, 16])
def test_metrics_do_not_depend_on_the_batch_size(batch_size: int, models: Path, corpus: Shards) -> None:
    model = trial_model(models, corpus)
    data = TrialData.open(corpus, model, DataConfig(history=2), ("val",))
    labels = {task: known.labels for task, known in model.tasks.items()}
    alone, together = (
        summarise(evaluate(model, data, "val", 10**6, size), labels, corpus.manifest.roles) for size in (1, batch_size)
    )
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_frozen_encoder_is_the_same_in_training(models: Path, examples: list[Example]) -> None:
    """Its dropout is off, and so are SpecAugment, layer drop and statistics of the batch."""
    for kind in ("hubert-layer", "conformer-relative"):
        model = build(models, kind, trainable="adapter+lora+tokens")
        still = model.clips(examples)
        model.train()
        assert all(torch.equal(one, other) for one, other in zip(model.clips(examples), still, strict=True))


def trial_model(models: Path, corpus: Shards, kind: str = "hubert-layer") -> SpeechLLM:
    seed_everything(3)
    model = SpeechLLM(settings(models, kind), answer_sets(corpus, TASKS.active()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def one_step(
    models: Path, corpus: Shards, cut: list[list[int]] | None, rank: int = 0, world: int = 1, kind: str = "hubert-layer"
) -> dict[str, Tensor]:
    """Gradients (clipped) and weights after one optimizer step over eight items of three tasks.

    Args:
        cut: the micro-batches, as places in the step; None: as the token budget has it.
    """
    model = trial_model(models, corpus, kind)
    data = TrialData.open(corpus, model, DataConfig(history=2), ("train",))
    config = TrainConfig(learning_rate=1e-3, warmup=0, losses=LOSSES, class_weights="balanced")
    trainer = Trainer(model, data, config, TASKS, 0, corpus.folder)
    model.train()
    items = data.splits["train"].items
    step = [[item[0] for item in items].index(task) + place for place in range(8) for task in model.tasks][:8]
    own = share(step, rank, world)
    (examples,) = data.read("train", [own])
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        found.update({f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(keep)
    with pytest.MonkeyPatch.context() as patch:
        if cut is not None:
            patch.setattr("model.training.trainer.micro_batches", lambda costs, budget, spared: cut)
        trainer.optimizer_step(step, own, examples)
    trainer.losses.read(trainer.progress.sums)
    found |= {f"weight {name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return found | {"losses": torch.tensor([value for pair in trainer.progress.sums.values() for value in pair])}


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Losses, gradients (relative to the largest of all: some vanish) and weights.

    AdamW divides a gradient by its own size, so where the true one is zero (keys' biases, for example) a weight moves
    by noise: weights are compared where the gradient is above that.
    """
    assert one.keys() == other.keys()
    assert close(one["losses"], other["losses"])
    gradients = [name for name in other if name.startswith("gradient of ")]
    largest = max(float(other[name].abs().max()) for name in gradients)
    assert largest > 0
    for name in gradients:
        assert float((one[name] - other[name]).abs().max()) <= 1e-5 * largest, name
        weight = name.replace("gradient of", "weight")
        clear = other[name].abs() > 1e-3 * largest
        assert float(((one[weight] - other[weight]) * clear).abs().max()) <= 1e-5 * float(other[weight].abs().max())


def every_cut(size: int) -> list[list[list[int]]]:
    """All ways to cut places 0 … size - 1 into consecutive micro-batches."""
    borders = chain.from_iterable(combinations(range(1, size), count) for count in range(size))
    return [[list(range(*pair)) for pair in zip((0, *cut), (*cut, size), strict=True)] for cut in borders]


@pytest.mark.parametrize("kind", ["hubert-layer", "hubert-group", "w2v-bert", "whisper"])
def test_a_step_does_not_depend_on_how_it_is_cut(kind: str, models: Path, corpus: Shards) -> None:
    alone = one_step(models, corpus, [[place] for place in range(8)], kind=kind)
    for size in SIZES:
        for order in ORDERS.values():
            check_equal(one_step(models, corpus, batches(order, size, order), kind=kind), alone)


def test_a_step_does_not_depend_on_any_accumulation_split(models: Path, corpus: Shards) -> None:
    """All 128 ways to cut the eight items of a step."""
    alone = one_step(models, corpus, [[place] for place in range(8)])
    for cut in every_cut(8):
        check_equal(one_step(models, corpus, cut), alone)


def worker(rank: int, models: Path, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    torch.save(one_step(models, Shards(folder), None, rank, 2), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_step_does_not_depend_on_the_number_of_workers(models: Path, corpus: Shards, tmp_path: Path) -> None:
    alone = one_step(models, corpus, None)
    as_two_workers(worker, models, corpus.folder, tmp_path)
    for rank in range(2):
        check_equal(torch.load(tmp_path / f"{rank}.pt"), alone)
