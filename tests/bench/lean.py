"""What the training loop adds to the bare work: against a minimal loop, and what its log and checkpoints take.

    python -m tests.bench lean

The LLM has 20 million parameters and reads text; the curves and checkpoints are those of the demo's trial, an epoch.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from data.loading.batching import micro_batches
from model.speech_llm.prompt import IGNORE
from model.training.random_state import seed_everything
from model.training.trainer import Trainer
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.execution.trial import build
from tests.bench.frozen import settings, trainer
from tests.bench.measure import Cost, Row, in_turns, measured, ratios

ROUNDS, STEPS, ITEMS, EPOCHS = 15, 5, 8, 5


def run() -> list[Row]:
    """The goals of both."""
    return [bare(), *noting()]


def bare() -> Row:
    """The step of `fit` and that of a minimal loop, over the same items, which are padded together."""
    text = {"model.modality": "text", "model.trainable": "lora", "model.cls": "none", "data.history": 3}
    config = settings(**text, **{"train.schedule": "constant", "train.warmup": 0.0})
    own, other = trainer(config), trainer(config)
    step = max(micro_batches(own.train.costs, own.token_budget), key=len)[:ITEMS]
    (examples,) = own.data.read("train", [step])
    own.model.train()
    steps = {"fit": lambda: own.optimizer_step(step, step, examples), "bare": minimal(other, step)}
    taken = in_turns({name: several(work) for name, work in steps.items()}, ROUNDS)
    pairs = zip(own.parameters, other.parameters, strict=True)
    apart = max(float((one - two).detach().abs().max()) for one, two in pairs)
    took = {name: 1000 * statistics.median(one.cpu for one in costs) / STEPS for name, costs in taken.items()}
    note = ", ".join(f"{milliseconds:.0f} ms {name}" for name, milliseconds in took.items())
    note += f"; weights apart by {apart:.1g} after {(ROUNDS + 1) * STEPS} steps"
    return Row("training step", "bare loop, same batch", ratios(taken["fit"], taken["bare"]), 1.03, True, note)


def several(step: Callable[[], None]) -> Callable[[], None]:
    """Enough steps for the clock of CPU time, which ticks every 10 ms."""

    def work() -> None:
        for _ in range(STEPS):
            step()

    return work


def minimal(own: Trainer, step: list[int]) -> Callable[[], None]:
    """Forward, loss, backward, clipping, AdamW, over tokens that were padded before: as little as can be written."""
    model, rate = own.model.train(), own.config.learning_rate
    (examples,) = own.data.read("train", [step])
    answers = [model.answer(example) for example in examples]
    rows = [
        [*model.prompt_builder.prompt(example).ids, *answer.inputs]
        for example, answer in zip(examples, answers, strict=True)
    ]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    targets_BT = torch.full_like(ids_BT, IGNORE)
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        targets_BT[place, len(row) - len(answer.targets) : len(row)] = torch.tensor(answer.targets)
    rows_P, columns_P = (targets_BT != IGNORE).nonzero().unbind(-1)
    targets_P = targets_BT[rows_P, columns_P]
    optimizer = torch.optim.AdamW(own.parameters, lr=rate, weight_decay=own.config.weight_decay, fused=True)
    llm: Any = model.llm.get_base_model()

    def work() -> None:
        hidden_BTE = llm.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        F.cross_entropy(llm.lm_head(hidden_BTE[rows_P, columns_P]), targets_P).backward()
        torch.nn.utils.clip_grad_norm_(own.parameters, own.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return work


def noting() -> list[Row]:
    """Epochs of the demo's trial: with its curve, checkpoints and predictions, against the same without their part."""
    config = resolve(load("demo", ["search.space={}", "search.points=[]"]))
    config = config.with_values({"train.epochs": EPOCHS + 1})
    seed_everything(0)
    model, data = build(config, "local", ("train", "val"), "cpu")
    own = Trainer(model, data, config.train, config.tasks, 0, Path(tempfile.mkdtemp()))
    spent: list[Cost] = []
    for name in ("save", "_log", "_log_epoch", "_write_predictions"):
        setattr(own, name, timed(getattr(own, name), spent))
    runs: list[tuple[Cost, float, float]] = []
    for epoch in range(EPOCHS + 1):
        spent.clear()
        whole = measured(lambda: (own.train_epoch(), own.finish_epoch()))
        if epoch:  # the first one warms up
            runs.append((whole, sum(cost.cpu for cost in spent), sum(cost.wall for cost in spent)))
    size = own.path.stat().st_size / 1e6
    note = f"{own.epoch_steps} steps an epoch, a checkpoint of {size:.1f} MB each; "
    took = {"CPU": [(one.cpu, cpu) for one, cpu, _ in runs], "wall": [(one.wall, wall) for one, _, wall in runs]}
    return [
        Row(
            f"curves and checkpoints, {kind} time",
            "the same without",
            [all_ / (all_ - part) for all_, part in pairs],
            1.02,
            True,
            note + f"{1000 * statistics.median(part for _, part in pairs):.0f} ms of an epoch",
        )
        for kind, pairs in took.items()
    ]


def timed(call: Callable[..., Any], spent: list[Cost]) -> Callable[..., Any]:
    """The same, noting what it takes."""

    def timing(*given: Any) -> None:
        cpu, wall = time.process_time(), time.monotonic()
        call(*given)
        spent.append(Cost(time.process_time() - cpu, time.monotonic() - wall))

    return timing
