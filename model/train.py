"""`fit`: one trial from its first or last step to its end. The same loop under Ray, in `sweep train` and in tests."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import get_scheduler

from data.augment import Draw
from data.config import TaskWeights
from data.errors import UserError
from data.examples import Example
from data.plan import micro_batches, plan, plan_hash, share
from data.stream import FIRST_STEPS
from model import checkpoint
from model.config import TrainConfig
from model.evaluate import Asked, TrialData, ask, evaluate, world
from model.imbalance import by_item, with_numbers
from model.losses import answer_losses
from model.metrics import Record, summarise
from model.parts import part_of
from model.speech_llm import SpeechLLM

Report = Callable[[int, dict[str, Any]], None]
LOG_EVERY = 10  # optimizer steps between two points of the training curve


class NonFiniteError(UserError):
    """The loss or a gradient is not a finite number; the update was not made."""

    in_every_worker = True  # it is looked for after the sums over workers


@dataclass
class Progress:
    """The state of the loop: everything of a run that is neither a weight nor a generator."""

    epoch: int = 0
    step: int = 0  # optimizer steps done in this epoch
    total_steps: int = 0
    examples: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)  # of this epoch: loss → [sum, predicted tokens]
    seconds: float = 0.0  # of training and evaluation, in the epochs that were finished
    data_wait: float = 0.0  # those of them for which the next batch was waited for
    history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # what was reported, by epoch


class Trainer:
    """The loop of `fit`, with its optimizer, schedule and state."""

    def __init__(
        self, model: SpeechLLM, data: TrialData, config: TrainConfig, tasks: TaskWeights, seed: int, folder: Path
    ) -> None:
        self.model, self.data, self.seed, self.folder = model, data, seed, folder
        self.config = with_numbers(config, model.tasks)
        self.task_weights: dict[str, float] = {task: getattr(tasks, task) for task in model.tasks}
        self.rank, self.world = world()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=config.weight_decay, foreach=False)
        self.train = data.splits["train"]
        steps = config.epochs * math.ceil(len(self.train.items) / config.batch_size)
        kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        self.schedule = get_scheduler(kind, self.optimizer, round(config.warmup * steps), steps)
        items, answers = self.train.items, self.train.answers
        self.importance = by_item(self.config.class_weights, items, answers) or [1.0] * len(items)
        self.drawn = by_item(self.config.sampling, items, answers)
        self.state = Progress()
        self.begun: Asked | None = None  # the first steps of the next epoch
        self.validation: Asked | None = None
        self.plan_hash = plan_hash(
            self.train.costs, data.shards.fingerprint, config.batch_size, seed, weights=self.drawn
        )

    @property
    def path(self) -> Path:
        """Where the checkpoint of this trial is."""
        return self.folder / checkpoint.FILE

    def _groups(self) -> list[dict[str, Any]]:
        """One group of parameters for every learning rate that the configuration tells apart."""
        groups: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                own = getattr(self.config.learning_rates, part_of(name), None)
                groups.setdefault(own or self.config.learning_rate, []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]

    def _ask(self, epoch: int, first: int = 0, last: int | None = None) -> Asked:
        """Steps of an epoch, and this worker's part of them."""
        size, draw = self.config.batch_size, Draw(self.seed, epoch)
        steps = plan(self.train.costs, batch_size=size, seed=self.seed, epoch=epoch, weights=self.drawn)
        chosen = steps[first:last]
        return Asked(chosen, self.data.read("train", [share(step, self.rank, self.world) for step in chosen], draw))

    def train_epoch(self) -> None:
        """The rest of the current epoch."""
        state = self.state
        self.model.augment = (self.seed, state.epoch)
        parts = [self.begun] if self.begun else []
        parts.append(self._ask(state.epoch, first=len(self.begun.batches) if self.begun else state.step))
        self.validation = ask(self.model, self.data, "val", self.config.token_budget)
        self.model.train()
        for steps, reading in parts:
            for step, examples in zip(steps, reading, strict=True):
                state.examples += len(step)
                self._optimizer_step(step, share(step, self.rank, self.world), examples)
                if state.total_steps % self.config.checkpoint_steps == 0:
                    self.save()
            state.data_wait += reading.waited

    def _factors(self, step: Sequence[int]) -> dict[int, float]:
        """By position of a step: what the sum of its losses is multiplied by.

        Each task counts with its weight times its mean loss per token, over the whole step: the divisors follow from
        the plan, so they are the same for every worker and every cut into micro-batches. Class weights, of which
        balanced ones are 1 on average over the corpus, are no part of the divisors: in a step of one item they would
        cancel.
        """
        totals: dict[str, int] = {}
        for position in step:
            task = self.train.items[position][0]
            totals[task] = totals.get(task, 0) + self.train.predicted[position]
        return {
            position: self.task_weights[task] * self.importance[position] / totals[task]
            for position, task in ((position, self.train.items[position][0]) for position in step)
        }

    def _optimizer_step(self, step: Sequence[int], own: Sequence[int], examples: Sequence[Example]) -> None:
        factors, total, sums = self._factors(step), 0.0, self._no_sums()
        for part in micro_batches([self.train.costs[position] for position in own], self.config.token_budget):
            losses = answer_losses(self.model, [examples[place] for place in part], self.config.losses)
            factor_B = torch.tensor([factors[own[place]] for place in part], device=self.model.device)
            loss = (losses.weighted(self.config.losses) * factor_B).sum()
            loss.backward()
            total += loss.item()
            for name, values_B in losses.parts().items():
                for place, value, count in zip(part, values_B.tolist(), losses.count_B, strict=True):
                    entry = sums[f"{examples[place].task}/{name}"]
                    entry[0], entry[1] = entry[0] + value, entry[1] + count
        total, sums = self._sum_over_workers(total, sums)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise NonFiniteError(
                f"non-finite {'gradient' if math.isfinite(total) else 'loss'} at step {self.state.total_steps + 1}, "
                f"learning rate {self.schedule.get_last_lr()[0]:.3g}; lower train.learning_rate"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._note(total, sums)

    def _no_sums(self) -> dict[str, list[float]]:
        """[sum, count] of every loss of every task, in an order that all workers share."""
        losses = self.config.losses
        names = ["next_token"] + [name for name in ("distillation", "hidden") if getattr(losses, name) > 0]
        return {f"{task}/{name}": [0.0, 0.0] for task in self.model.tasks for name in names}

    def _note(self, total: float, sums: dict[str, list[float]]) -> None:
        """Count a step that was made."""
        state = self.state
        state.step, state.total_steps = state.step + 1, state.total_steps + 1
        for name, (value, count) in sums.items():
            entry = state.sums.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + value, entry[1] + count
        if state.total_steps % LOG_EVERY == 0:
            self._log({"train_loss_step": total, "learning_rate": self.schedule.get_last_lr()[0]})

    def _sum_over_workers(self, total: float, sums: dict[str, list[float]]) -> tuple[float, dict[str, list[float]]]:
        """Sum the gradients of all workers in place, and what was counted."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if self.world == 1:
            return total, sums
        numbers = [total, *(number for pair in sums.values() for number in pair)]
        flat = torch.tensor(numbers, dtype=torch.float64, device=self.model.device)
        dist.all_reduce(flat)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        vector = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(vector)
        for gradient, part in zip(gradients, vector.split([own.numel() for own in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        values = iter(flat.tolist())
        return next(values), {name: [next(values), next(values)] for name in sums}

    def finish_epoch(self, started: float) -> dict[str, Any]:
        """Evaluate, write the checkpoint, and return what to report."""
        state, last = self.state, self.state.epoch + 1 == self.config.epochs
        # No more than the first read task has: one that is under way when the trial is pruned takes its process along.
        self.begun = None if last else self._ask(state.epoch + 1, last=FIRST_STEPS)
        validation = self.validation or ask(self.model, self.data, "val", self.config.token_budget)
        records = evaluate(self.model, self.data, "val", self.config.token_budget, asked=validation)
        self.validation = None
        state.data_wait += validation.reading.waited
        state.epoch, state.step = state.epoch + 1, 0
        state.seconds += time.monotonic() - started
        metrics: dict[str, Any] = {
            **self._measure(records),
            **self._train_losses(),
            "epoch": state.epoch,
            "steps": state.total_steps,
            "seconds": state.seconds,
            "data_wait": state.data_wait,
            "dropped_turns": self.data.dropped_turns,
            "short_clips": self.data.short_clips,
        }
        state.sums = {}
        state.history.append((state.epoch, metrics))
        self._log({name: value for name, value in metrics.items() if name not in ("epoch", "steps")})
        if self.rank == 0:
            labels = {task: known.labels for task, known in self.model.tasks.items()}
            content = {"labels": labels, "records": [record.as_dict() for record in records]}
            _write_json(self.folder / "predictions.json", content)
        self.save()
        return metrics

    def _measure(self, records: Sequence[Record]) -> dict[str, float]:
        """Validation metrics; with several tasks also the weighted sum of their losses."""
        labels = {task: known.labels for task, known in self.model.tasks.items()}
        found = summarise(records, labels, self.data.shards.manifest.roles)
        if len(labels) > 1:
            names = ["loss", *(f"{task}/loss" for task in list(labels)[1:])]
            weights = [self.task_weights[task] for task in labels]
            found["total_loss"] = sum(weight * found[name] for weight, name in zip(weights, names, strict=True))
        return found

    def _train_losses(self) -> dict[str, float]:
        """Mean per token over the epoch, of every loss by itself."""
        first = next(iter(self.model.tasks))
        found = {}
        for name, (value, count) in self.state.sums.items():
            shown = name.removesuffix("/next_token").removeprefix(first).strip("/")
            found[f"train_loss/{shown}".rstrip("/")] = value / count
        return found

    def is_over(self) -> bool:
        """Whether all epochs are done, or validation loss has not fallen for `patience` of them."""
        if self.state.epoch >= self.config.epochs:
            return True
        if self.config.patience is None or not self.state.history:
            return False
        losses = [metrics.get("total_loss", metrics["loss"]) for _, metrics in self.state.history]
        best = min(range(len(losses)), key=lambda place: (not math.isfinite(losses[place]), losses[place]))
        return len(losses) - 1 - best >= self.config.patience

    def save(self) -> None:
        """Write the checkpoint; generators of every worker are in it."""
        generators: list[Any] = [checkpoint.generator_state()]
        if self.world > 1:
            generators = [None] * self.world
            dist.all_gather_object(generators, checkpoint.generator_state())
        if self.rank == 0:
            state = {
                "tensors": checkpoint.trained_tensors(self.model),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "generators": generators,
                "progress": {name: getattr(self.state, name) for name in Progress.__dataclass_fields__},
                "plan_hash": self.plan_hash,
                "fingerprint": self.data.shards.fingerprint,
                "digest": checkpoint.digest(checkpoint.trained_tensors(self.model)),
                "parents": self.model.parents,
                "files": self.model.files,
                "meaning": self.model.meaning(),
            }
            checkpoint.save(self.path, state)
        if self.world > 1:
            dist.barrier()

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            CheckpointError: it is damaged, or belongs to another model or another batch plan.
        """
        if not self.path.exists():
            return
        state = checkpoint.load(self.path)
        if state["plan_hash"] != self.plan_hash:
            raise checkpoint.CheckpointError(
                f"{self.path}: made on other data or with another batch size or seed; use another folder"
            )
        checkpoint.restore(self.model, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        checkpoint.restore_generators(state["generators"][min(self.rank, len(state["generators"]) - 1)])
        self.state = Progress(**state["progress"])

    def _log(self, values: dict[str, float]) -> None:
        """Append a point to the trial's curve; one write, so that a kill never leaves half of another's line."""
        if self.rank == 0:
            line = json.dumps({"time": time.time(), "step": self.state.examples, "values": values}) + "\n"
            descriptor = os.open(self.folder / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)


def fit(
    model: SpeechLLM,
    data: TrialData,
    config: TrainConfig,
    tasks: TaskWeights,
    seed: int,
    folder: Path,
    report: Report,
) -> None:
    """Train a model to the end, or on from the checkpoint in `folder`.

    Args:
        model: freshly made under `seed`.
        data: with the splits train and val.
        config: of the training.
        tasks: weights of the model's tasks.
        seed: of the batch plan.
        folder: gets checkpoint.pt, metrics.jsonl (the curves) and predictions.json (of the last evaluation).
        report: called with (epoch, metrics) after every epoch, also again for those before a resume; it may raise to
            stop the trial.

    Raises:
        NonFiniteError: before an update with a loss or gradient that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, data, config, tasks, seed, folder)
    trainer.resume()
    for epoch, metrics in list(trainer.state.history):
        report(epoch, metrics)
    try:
        while not trainer.is_over():
            started = time.monotonic()
            trainer.train_epoch()
            metrics = trainer.finish_epoch(started)
            report(trainer.state.epoch, metrics)
    finally:
        data.close()  # what was read ahead for an epoch that is not trained


def _write_json(path: Path, content: Any) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.replace(path)
