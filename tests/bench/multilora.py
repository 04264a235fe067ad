"""Several trials over one base: one pass of the LLM for the batches of K trials, each with its own LoRA, adapter and
optimizer, against the same trials one after another.

It would be worth an option if it were faster by a third. Trials of a sweep share the batch plan, so nothing is lost to
padding here; ranks differ.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from data.loading.batching import plan
from model.objectives.losses import student_outputs
from model.speech_llm.language_model import load_llm, shared_view
from model.training.trainer import Trainer
from sweep.preflight.feature_cache import ENCODER_FEATURES
from tests.bench.materials import CACHE, compute, hubert, settings, trainer, weights
from tests.bench.measure import Row, in_turns, ratios

RANKS = (8, 16, 4, 32)
CASES = {"4 dialogues, 10 turns of history": (4, 10, 3), "1 clip alone": (1, 0, 12)}  # items, turns, rounds


def run() -> list[Row]:
    """Measure without a goal: from 1.3 on it would be worth its code."""
    torch.set_num_threads(1)
    return [compare(name, count) for name in CASES for count in (2, 4)]


def compare(name: str, count: int) -> Row:
    """Train so many trials, which differ in rank and learning rate, from cached features."""
    items, turns, rounds = CASES[name]
    # The frames and the width of HuBERT-base, at little cost: its output is read from files here.
    encoder = str(hubert(num_hidden_layers=1, intermediate_size=64, conv_dim=(32,) * 7))
    base = settings(**{"model.encoder.path": encoder, "train.batch_size": items, "data.history": turns})
    features = compute(ENCODER_FEATURES.requests(base, CACHE))
    values = [{"model.lora.rank": rank, "train.learning_rate": 1e-3 * n} for n, rank in enumerate(RANKS[:count], 1)]
    alone, joint = ([trainer(base.with_values(changed), features) for changed in values] for _ in range(2))
    llm = joined(joint, items)
    steps = plan(alone[0].train.costs, batch_size=items, seed=0, epoch=0)
    next_alone, next_joint = iter(steps), iter(steps)

    def apart() -> None:
        step = next(next_alone)
        for trial in alone:
            trial.optimizer_step(step, step, *trial.data.read("train", [step]))

    taken = in_turns({"apart": apart, "together": lambda: optimize(llm, joint, next(next_joint))}, rounds)
    tokens = statistics.median(
        max(alone[0].train.costs[position].tokens for position in step) for step in steps[: rounds + 1]
    )
    cpu = {side: 1000 * statistics.median(cost.cpu for cost in costs) for side, costs in taken.items()}
    pairs = [pair for trials in zip(alone, joint, strict=True) for pair in zip(*map(weights, trials), strict=True)]
    apart_by = max(((weight - other).norm() / weight.norm()).item() for weight, other in pairs)
    note = f"{cpu['apart']:.0f} and {cpu['together']:.0f} ms; {tokens:.0f} tokens; weights differ by {apart_by:.1g}"
    runs = ratios(taken["apart"], taken["together"])
    return Row(f"{count} trials in one pass, {name}", "one after another", runs, note=note)


class Joined(nn.Module):
    """A frozen linear layer whose input rows belong to several trials, in order, as many rows each."""

    def __init__(self, layers: Sequence[Any], rows: int) -> None:
        super().__init__()
        self.base, self.rows = layers[0].base_layer, rows
        self.parts = [(lora.lora_A["default"], lora.lora_B["default"], lora.scaling["default"]) for lora in layers]

    def forward(self, x_BTE: Tensor) -> Tensor:
        parts = zip(x_BTE.split(self.rows), self.parts, strict=True)
        return self.base(x_BTE) + torch.cat([up(down(part)) * scale for part, (down, up, scale) in parts])


def joined(trainers: Sequence[Trainer], rows: int) -> nn.Module:
    """Return the base LLM with the LoRA layers of all trials."""
    config = trainers[0].model.config.llm
    llm = shared_view(load_llm(config.path, config.dtype, "cpu"))
    for name, module in trainers[0].model.llm.named_modules():
        if isinstance(module, LoraLayer):
            layers = [trained.model.llm.get_submodule(name) for trained in trainers]
            llm.set_submodule(name.removeprefix("base_model.model."), Joined(layers, rows))
    return llm


def optimize(llm: nn.Module, trainers: Sequence[Trainer], step: Sequence[int]) -> None:
    """Take a step of each trial. Their parameters are disjoint, so gradients of the sum of their losses do not mix."""
    sequences, answers, factors = [], [], []
    for trained in trainers:
        [examples] = trained.data.read("train", [step])
        targets = [trained.model.answer(example) for example in examples]
        for prompt, answer in zip(trained.model.prompts(examples), targets, strict=True):
            sequences.append(torch.cat([prompt, trained.model.embed(answer.inputs)]))
        answers += targets
        predicted = sum(trained.train.predicted[position] for position in step)
        factors += [trained.item_weights[position] / predicted for position in step]
    outputs = student_outputs(llm, sequences, answers, hidden=False)
    nll_P = F.cross_entropy(outputs.logits_PV, outputs.targets_P, reduction="none")
    (outputs.sum_by_example(nll_P, len(answers)) * torch.tensor(factors)).sum().backward()
    for trained in trainers:
        torch.nn.utils.clip_grad_norm_(trained.parameters, trained.config.max_grad_norm)
        trained.optimizer.step()
        trained.schedule.step()
        trained.optimizer.zero_grad(set_to_none=True)
