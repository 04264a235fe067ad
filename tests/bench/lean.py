"""What the training loop adds to the bare work: against a minimal loop, and what its log and checkpoints take.

    python -m tests.bench lean

The LLM has 20 million parameters and reads text; the curves and checkpoints are those of the demo's trial, an epoch.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from data.loading.batching import micro_batches
from model.speech_llm.prompt import IGNORE
from model.training.trainer import Trainer
from sweep.config.files import load
from sweep.config.resolve import resolve
from tests.bench.materials import settings, trainer
from tests.bench.measure import Cost, Row, in_turns, measured, ratios

ROUNDS, STEPS, ITEMS, EPOCHS = 15, 5, 8, 5


def run() -> list[Row]:
    """Measure both."""
    return [bare(), *logging()]


def bare() -> Row:
    """The step of `fit` and that of a minimal loop, over the same items, which are padded together."""
    text = {"model.modality": "text", "model.trainable": "lora", "model.cls": "none", "data.history": 3}
    config = settings(**text, **{"train.schedule": "constant", "train.warmup": 0.0})
    trained, other = trainer(config), trainer(config)
    step = max(micro_batches(trained.train.costs, trained.token_budget), key=len)[:ITEMS]
    (examples,) = trained.data.read("train", [step])
    trained.model.train()
    steps = {"fit": lambda: trained.optimizer_step(step, step, examples), "bare": minimal(other, step)}
    # Several steps at once, for the clock of CPU time, which ticks every 10 ms.
    taken = in_turns({name: lambda work=work: [work() for _ in range(STEPS)] for name, work in steps.items()}, ROUNDS)
    pairs = zip(trained.parameters, other.parameters, strict=True)
    apart = max(float((fitted - bare).detach().abs().max()) for fitted, bare in pairs)
    took = {name: 1000 * statistics.median(cost.cpu for cost in costs) / STEPS for name, costs in taken.items()}
    note = ", ".join(f"{milliseconds:.0f} ms {name}" for name, milliseconds in took.items())
    note += f"; weights apart by {apart:.1g} after {(ROUNDS + 1) * STEPS} steps"
    return Row("training step", "bare loop, same batch", ratios(taken["fit"], taken["bare"]), 1.03, True, note)


def minimal(trained: Trainer, step: list[int]) -> Callable[[], None]:
    """Forward, loss, backward, clipping, AdamW, over tokens that were padded before: as little as can be written."""
    model, rate = trained.model.train(), trained.config.learning_rate
    (examples,) = trained.data.read("train", [step])
    answers = [model.answer(example) for example in examples]
    rows = [
        [*model.prompt_builder.prompt(example).ids, *answer.inputs]
        for example, answer in zip(examples, answers, strict=True)
    ]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    targets_BT = torch.full_like(ids_BT, IGNORE)
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        targets_BT[index, len(row) - len(answer.targets) : len(row)] = torch.tensor(answer.targets)
    rows_P, columns_P = (targets_BT != IGNORE).nonzero().unbind(-1)
    targets_P = targets_BT[rows_P, columns_P]
    optimizer = torch.optim.AdamW(trained.parameters, lr=rate, weight_decay=trained.config.weight_decay, fused=True)
    llm: Any = model.llm.get_base_model()

    def work() -> None:
        hidden_BTE = llm.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        F.cross_entropy(llm.lm_head(hidden_BTE[rows_P, columns_P]), targets_P).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters, trained.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return work


def logging() -> list[Row]:
    """Epochs of the demo's trial: with its metrics log, checkpoints and predictions, against the same without them."""
    config = resolve(load("demo", ["search.space={}", "search.points=[]"]))
    trained = trainer(config.with_values({"train.epochs": EPOCHS + 1}), splits=("train", "val"))
    parts: list[Cost] = []

    def timed(call: Callable[..., object]) -> Callable[..., None]:
        def timing(*given: Any) -> None:
            cpu, wall = time.process_time(), time.monotonic()
            call(*given)
            parts.append(Cost(time.process_time() - cpu, time.monotonic() - wall))

        return timing

    trained.save = timed(trained.save)  # type: ignore[method-assign]
    for name in ("log", "log_epoch", "write_predictions"):
        setattr(trained.folder, name, timed(getattr(trained.folder, name)))
    runs: dict[str, list[tuple[float, float]]] = {"CPU": [], "wall": []}  # of all, and of the part
    for epoch in range(EPOCHS + 1):
        parts.clear()
        total = measured(lambda: (trained.train_epoch(), trained.finish_epoch()))
        if epoch:  # the first one warms up
            runs["CPU"].append((total.cpu, sum(cost.cpu for cost in parts)))
            runs["wall"].append((total.wall, sum(cost.wall for cost in parts)))
    size = trained.folder.checkpoint_path.stat().st_size / 1e6
    rows = []
    for kind, pairs in runs.items():
        note = f"{trained.epoch_steps} steps an epoch, a checkpoint of {size:.1f} MB each; "
        note += f"{1000 * statistics.median(part for _, part in pairs):.0f} ms of an epoch"
        ratio = [total / (total - part) for total, part in pairs]
        rows.append(Row(f"curves and checkpoints, {kind} time", "the same without", ratio, 1.02, True, note))
    return rows
