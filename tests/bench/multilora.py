"""Several trials over one base: one pass of the LLM for the batches of K trials, each with its own LoRA, adapter and
optimizer, against the same trials one after another.

It would be worth an option if it were faster by a third. Trials of a sweep share the batch plan, so nothing is lost to
padding here; ranks differ.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from data.loading.batching import plan
from data.loading.examples import Example
from model.objectives.losses import student_outputs
from model.speech_llm.language_model import load_llm, shared_view
from model.tiny import fixed_seed
from model.training.trainer import Trainer
from sweep.preflight.feature_cache import ENCODER_FEATURES
from tests.bench.frozen import compute, made, settings, trainer, weights
from tests.bench.measure import Row, in_turns, ratios
from tests.bench.reading import CACHE

RANKS = (8, 16, 4, 32)
CASES = {"4 dialogues, 10 turns of history": (4, 10, 3), "1 clip alone": (1, 0, 12)}  # items, turns, rounds


def run() -> list[Row]:
    """No goal: of 1.3 and more it would be worth its code."""
    torch.set_num_threads(1)
    return [compare(name, count) for name in CASES for count in (2, 4)]


def compare(name: str, count: int) -> Row:
    """So many trials."""
    items, turns, rounds = CASES[name]
    alone, joint = trials(count, items, turns), trials(count, items, turns)
    llm, layers = joined(joint)
    steps, places = (
        plan(alone[0].train.costs, batch_size=items, seed=0, epoch=0),
        (itertools.count(), itertools.count()),
    )

    def apart() -> None:
        step = steps[next(places[0])]
        for own in alone:
            own.optimizer_step(step, step, read(own, step))

    def together() -> None:
        step = steps[next(places[1])]
        for layer in layers:
            layer.rows = items
        optimize(llm, joint, step)

    taken = in_turns({"apart": apart, "together": together}, rounds)
    tokens = statistics.median(
        max(sum(own.train.costs[place]) for place in step) for own in alone[:1] for step in steps[: rounds + 1]
    )
    cpu = {side: 1000 * statistics.median(cost.cpu for cost in costs) for side, costs in taken.items()}
    note = f"{cpu['apart']:.0f} and {cpu['together']:.0f} ms; {tokens:.0f} tokens"
    note += f"; weights differ by {differ(alone, joint):.1g}"
    return Row(
        f"{count} trials in one pass, {name}", "one after another", ratios(taken["apart"], taken["together"]), note=note
    )


def trials(count: int, items: int, turns: int) -> list[Trainer]:
    """They differ in rank and learning rate, and read features."""
    encoder = str(made("thin-hubert", make_thin_hubert))
    base = settings(**{"model.encoder.path": encoder, "train.batch_size": items, "data.history": turns})
    features = compute(ENCODER_FEATURES.request(base, CACHE)).folder
    varied: list[dict[str, Any]] = [
        {"model.lora.rank": rank, "train.learning_rate": 1e-3 * (place + 1)} for place, rank in enumerate(RANKS[:count])
    ]
    return [trainer(base.with_values(values), features) for values in varied]


def make_thin_hubert(folder: Path) -> None:
    """The frames and the width of HuBERT-base, at little cost: what it makes is read from files here."""
    with fixed_seed(seed=0):
        thin = HubertConfig(num_hidden_layers=1, intermediate_size=64, conv_dim=(32,) * 7)
        HubertModel(thin).eval().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)


class Joined(nn.Module):
    """A frozen linear layer whose input rows belong to several trials, in order, as many rows each."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.base, self.rows = layers[0].base_layer, 0
        self.parts = [(one.lora_A["default"], one.lora_B["default"], one.scaling["default"]) for one in layers]

    def forward(self, x_BTE: Tensor) -> Tensor:
        updates = [
            up(down(own)) * scale for own, (down, up, scale) in zip(x_BTE.split(self.rows), self.parts, strict=True)
        ]
        return self.base(x_BTE) + torch.cat(updates)  # type: ignore[no-any-return]


def joined(trainers: Sequence[Trainer]) -> tuple[nn.Module, list[Joined]]:
    """The base LLM with the LoRA layers of all trials."""
    config, layers = trainers[0].model.config.llm, []
    llm = shared_view(load_llm(config.path, config.dtype, "cpu"))
    for name, module in trainers[0].model.llm.named_modules():
        if isinstance(module, LoraLayer):
            layers.append(Joined([own.model.llm.get_submodule(name) for own in trainers]))
            llm.set_submodule(name.removeprefix("base_model.model."), layers[-1])
    return llm, layers


def optimize(llm: nn.Module, trainers: Sequence[Trainer], step: Sequence[int]) -> None:
    """A step of each trial. Their parameters are disjoint, so gradients of the sum of their losses do not mix."""
    sequences, answers, factors = [], [], []
    for own in trainers:
        examples, factor = read(own, step), own._factors(step)
        said = [own.model.answer(example) for example in examples]
        prompts = own.model.prompts(examples)
        sequences += [
            torch.cat([prompt, own.model.embed(one.inputs)]) for prompt, one in zip(prompts, said, strict=True)
        ]
        answers += said
        factors += [factor[position] for position in step]
    seen = student_outputs(llm, sequences, answers, hidden=False)
    nll_P = F.cross_entropy(seen.logits_PV, seen.targets_P, reduction="none")
    (seen.sum_by_example(nll_P, len(answers)) * torch.tensor(factors)).sum().backward()
    for own in trainers:
        torch.nn.utils.clip_grad_norm_(own.parameters, own.config.max_grad_norm)
        own.optimizer.step()
        own.schedule.step()
        own.optimizer.zero_grad(set_to_none=True)


def read(own: Trainer, step: Sequence[int]) -> Sequence[Example]:
    """The examples of a step."""
    [examples] = own.data.read("train", [step])
    return examples


def differ(ones: Sequence[Trainer], others: Sequence[Trainer]) -> float:
    """The largest relative difference between tensors of two lists of trials."""
    pairs = [
        pair for one, other in zip(ones, others, strict=True) for pair in zip(weights(one), weights(other), strict=True)
    ]
    return max(((one - other).norm() / one.norm()).item() for one, other in pairs)
