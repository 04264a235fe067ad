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
from transformers import get_linear_schedule_with_warmup

from data.errors import UserError
from data.examples import Example
from data.plan import micro_batches, plan, plan_hash, share
from model import checkpoint
from model.config import TrainConfig
from model.evaluate import TrialData, evaluate, world
from model.metrics import summarise
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
    loss_sum: float = 0.0  # of this epoch
    loss_count: int = 0
    seconds: float = 0.0  # of training and evaluation, in the epochs that were finished
    history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # what was reported, by epoch


class Trainer:
    """The loop of `fit`, with its optimizer, schedule and state."""

    def __init__(self, model: SpeechLLM, data: TrialData, config: TrainConfig, seed: int, folder: Path) -> None:
        self.model, self.data, self.config, self.seed, self.folder = model, data, config, seed, folder
        self.rank, self.world = world()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False
        )
        steps = config.epochs * math.ceil(len(data.rows["train"]) / config.batch_size)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, round(config.warmup * steps), steps)
        self.state = Progress()
        self.plan_hash = plan_hash(
            data.costs["train"], data.shards.manifest.fingerprint, batch_size=config.batch_size, seed=seed
        )

    @property
    def path(self) -> Path:
        """Where the checkpoint of this trial is."""
        return self.folder / "checkpoint.pt"

    def train_epoch(self) -> None:
        """The rest of the current epoch."""
        steps = plan(
            self.data.costs["train"], batch_size=self.config.batch_size, seed=self.seed, epoch=self.state.epoch
        )[self.state.step :]
        shares = [share(step, self.rank, self.world) for step in steps]
        self.model.train()
        for step, own, examples in zip(steps, shares, self.data.read("train", shares), strict=True):
            self.state.examples += len(step)
            self._optimizer_step(examples, [self.data.costs["train"][position] for position in own])
            if self.state.total_steps % self.config.checkpoint_steps == 0:
                self.save()

    def _optimizer_step(self, examples: Sequence[Example], costs: Sequence[int]) -> None:
        total, count = 0.0, 0
        for part in micro_batches(costs, self.config.token_budget):
            loss, predicted = self.model.loss([examples[place] for place in part])
            loss.backward()
            total, count = total + loss.item(), count + predicted
        total, count = self._sum_over_workers(total, count)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / count
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise NonFiniteError(
                f"non-finite {'gradient' if math.isfinite(total) else 'loss'} at step {self.state.total_steps + 1}, "
                f"learning rate {self.schedule.get_last_lr()[0]:.3g}; lower train.learning_rate"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        state = self.state
        state.step, state.total_steps = state.step + 1, state.total_steps + 1
        state.loss_sum, state.loss_count = state.loss_sum + total, state.loss_count + count
        if state.total_steps % LOG_EVERY == 0:
            self._log({"train_loss_step": total / count, "learning_rate": self.schedule.get_last_lr()[0]})

    def _sum_over_workers(self, total: float, count: int) -> tuple[float, int]:
        """Sum the gradients of all workers in place, and (loss, number of predicted tokens)."""
        if self.world == 1:
            return total, count
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        sums = torch.tensor([total, count], dtype=torch.float64, device=self.model.device)
        dist.all_reduce(sums)
        vector = torch.cat([gradient.flatten() for gradient in flat])
        dist.all_reduce(vector)
        for parameter, part in zip(self.parameters, vector.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        return float(sums[0]), int(sums[1])

    def finish_epoch(self, started: float) -> dict[str, Any]:
        """Evaluate, write the checkpoint, and return what to report."""
        records, loss = evaluate(self.model, self.data, "val", self.config.token_budget)
        manifest, state = self.data.shards.manifest, self.state
        state.epoch, state.step = state.epoch + 1, 0
        state.seconds += time.monotonic() - started
        metrics: dict[str, Any] = {
            **summarise(records, manifest.labels, manifest.roles),
            "loss": loss,
            "train_loss": state.loss_sum / state.loss_count,
            "epoch": state.epoch,
            "steps": state.total_steps,
            "seconds": state.seconds,
            "dropped_turns": self.data.dropped_turns,
        }
        state.loss_sum, state.loss_count = 0.0, 0
        state.history.append((state.epoch, metrics))
        self._log({name: value for name, value in metrics.items() if name not in ("epoch", "steps")})
        if self.rank == 0:
            _write_json(self.folder / "predictions.json", [record.as_dict() for record in records])
        self.save()
        return metrics

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
                "fingerprint": self.data.shards.manifest.fingerprint,
                "digest": checkpoint.digest(checkpoint.trained_tensors(self.model)),
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
        checkpoint.load_tensors(self.model, state["tensors"])
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


def fit(model: SpeechLLM, data: TrialData, config: TrainConfig, seed: int, folder: Path, report: Report) -> None:
    """Train a model to the end, or on from the checkpoint in `folder`.

    Args:
        model: freshly made under `seed`.
        data: with the splits train and val.
        config: of the training.
        seed: of the batch plan.
        folder: gets checkpoint.pt, metrics.jsonl (the curves) and predictions.json (of the last evaluation).
        report: called with (epoch, metrics) after every epoch, also again for those before a resume; it may raise to
            stop the trial.

    Raises:
        NonFiniteError: before an update with a loss or gradient that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, data, config, seed, folder)
    trainer.resume()
    for epoch, metrics in list(trainer.state.history):
        report(epoch, metrics)
    while trainer.state.epoch < config.epochs:
        started = time.monotonic()
        trainer.train_epoch()
        metrics = trainer.finish_epoch(started)
        report(trainer.state.epoch, metrics)


def _write_json(path: Path, content: Any) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.replace(path)
