"""`fit`: one trial from its first or last step to its end. The same loop under Ray, in `sweep train` and in tests."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from data.config import TaskWeights
from data.loading.augment import AugmentSeed
from data.loading.batching import Cost, micro_batches, plan, plan_hash, share
from data.loading.examples import Example
from data.loading.ray_source import FIRST_STEPS
from model.config import TrainConfig
from model.evaluation.evaluator import Asked, ask, evaluate
from model.evaluation.metrics import Record, summarise
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import resolve_balanced, weights_by_item
from model.objectives.losses import answer_losses
from model.runtime import memory
from model.runtime.device import on_device
from model.runtime.distributed import any_worker, sum_gradients
from model.speech_llm.speech_llm import SpeechLLM
from model.training.loss_accumulator import LossAccumulator, Step, means
from model.training.optimizer import make_optimizer, make_schedule
from model.training.random_state import generator_state, restore_generators
from model.training.run_folder import Resumable

Report = Callable[[int, dict[str, Any]], None]
LOG_EVERY = 10  # optimizer steps between two points of the training curve, and for which none waits for the device


class TrialInterrupted(Exception):  # noqa: N818 — not an error
    """The training was asked to end; all that it did is in the checkpoint."""


def never() -> bool:
    """Nothing asks the training to end."""
    return False


class Trainer(Resumable):
    """The loop of `fit`, with its optimizer, schedule and state."""

    def __init__(
        self,
        model: SpeechLLM,
        data: TrialData,
        config: TrainConfig,
        tasks: TaskWeights,
        seed: int,
        folder: Path,
        interrupted: Callable[[], bool] = never,
    ) -> None:
        super().__init__(model, data, resolve_balanced(config, model.tasks), folder)
        self.seed, self.interrupted = seed, interrupted
        self.task_weights: dict[str, float] = {task: getattr(tasks, task) for task in model.tasks}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.train = data.splits["train"]
        self.steps = math.ceil(len(self.train.items) / config.batch_size)  # of an epoch
        self.schedule = make_schedule(self.optimizer, config, config.epochs * self.steps)
        items, answers = self.train.items, self.train.answers
        self.importance = weights_by_item(self.config.class_weights, items, answers) or [1.0] * len(items)
        self.drawn = weights_by_item(self.config.sampling, items, answers)
        self.begun: Asked | None = None  # the first steps of the next epoch
        self.validation: Asked | None = None
        self.stop = self.due = False  # what all workers know since the last step: to end; to write a checkpoint
        self.tally = LossAccumulator(list(model.tasks), config.losses, model.device)
        self.found_inf = torch.zeros((), device=model.device)  # 1: no step is made any more
        self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]  # as torch's GradScaler does
        self.since = time.monotonic()  # the last checkpoint, or the start of the epoch
        self.counted = self.since  # up to when the time is in `state.seconds`
        self.computing: list[int] = []  # items of the micro-batch that is computed
        fingerprint = data.shards.fingerprint
        self.plan_hash = plan_hash(self.train.costs, fingerprint, config.batch_size, seed, weights=self.drawn)

    def _ask(self, epoch: int, first: int = 0, last: int | None = None) -> Asked:
        """Steps of an epoch, and this worker's part of them."""
        size, draw = self.config.batch_size, AugmentSeed(self.seed, epoch)
        steps = plan(self.train.costs, batch_size=size, seed=self.seed, epoch=epoch, weights=self.drawn)[first:last]
        return Asked(steps, self.data.read("train", [share(step, self.rank, self.world) for step in steps], draw))

    def train_epoch(self) -> None:
        """The rest of the current epoch.

        Raises:
            Interrupted: after a checkpoint of the last step.
        """
        state = self.state
        self.counted = time.monotonic()
        self.end_if_asked()
        self.model.augment = (self.seed, state.epoch)
        parts = [self.begun] if self.begun else []
        first = len(self.begun.batches) if self.begun else state.step
        if first < self.steps:
            parts.append(self._ask(state.epoch, first))
        self.validation = ask(self.model, self.data, "val", self.budget)
        self.model.train()
        self.since = time.monotonic()
        for steps, reading in parts:
            for step, examples in zip(steps, reading, strict=True):
                state.examples += len(step)
                self._optimizer_step(step, share(step, self.rank, self.world), examples)
                if self.stop or self.due or state.total_steps % self.config.checkpoint_steps == 0:
                    self.save()
                    self.since = time.monotonic()
                if self.stop:
                    self._end()
            state.data_wait += reading.waited
        self.tally.read(state.sums)

    def end_if_asked(self) -> None:
        """Between steps, at a place that all workers reach.

        Raises:
            Interrupted: a worker was asked to end; all that was done is in the checkpoint.
        """
        if any_worker(self.interrupted())[0]:
            if self.saved < self.state.total_steps:
                self.save()
            self._end()

    def _end(self) -> NoReturn:
        raise TrialInterrupted(f"ended after step {self.state.total_steps}, which is in the checkpoint")

    def save(self) -> None:
        """Write the checkpoint, of steps that are known to be sound.

        Raises:
            NonFiniteError: one was not, and was not made.
            Superseded, StorageError: as `checkpoint.save`.
        """
        self.tally.read(self.state.sums)
        self._count_time()
        super().save()

    def _count_time(self) -> None:
        """With every checkpoint, so that a trial has used what all of its attempts have."""
        now = time.monotonic()
        self.state.seconds += now - self.counted
        self.counted = now

    def _tokens(self, step: Sequence[int]) -> dict[str, int]:
        """Predicted tokens of a step, by task."""
        found = dict.fromkeys(self.model.tasks, 0)
        for position in step:
            found[self.train.items[position][0]] += self.train.predicted[position]
        return found

    def _factors(self, step: Sequence[int]) -> dict[int, float]:
        """By position of a step: what the sum of its losses is multiplied by.

        Each task counts with its weight times its mean loss per token, over the whole step: the divisors follow from
        the plan, so they are the same for every worker and every cut into micro-batches. Class weights, of which
        balanced ones are 1 on average over the corpus, are no part of the divisors: in a step of one item they would
        cancel.
        """
        totals = self._tokens(step)
        return {
            position: self.task_weights[task] * self.importance[position] / totals[task]
            for position, task in ((position, self.train.items[position][0]) for position in step)
        }

    def _optimizer_step(self, step: Sequence[int], own: Sequence[int], examples: Sequence[Example]) -> None:
        """Nothing here waits for the device: whether the step is sound, its optimizer sees, and the tally tells."""
        total, sums_N = self._gradients(step, own, examples)
        self._agree()
        total = sum_gradients(self.parameters, total)
        with memory.told("the step of the optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            self.found_inf.logical_or_(~(total + norm).isfinite())
            self.optimizer.step()
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._note(Step(self.state.total_steps + 1, rate, self._tokens(step), total, norm, sums_N))

    def _gradients(self, step: Sequence[int], own: Sequence[int], examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """This worker's part of a step, with as much at once as fits into memory."""
        before = generator_state()
        while True:
            try:
                return self._backward(step, own, examples)
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
                self._compute_less([self.train.costs[position] for position in self.computing], len(self.computing))
                if self.world > 1:  # the others wait for this one: the group starts again, and reads the new budget
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            memory.free()
            restore_generators(before)

    def _backward(self, step: Sequence[int], own: Sequence[int], examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Gradients, their loss, and the sums_N of all losses, of this worker's part of a step."""
        factors, (total, sums_N) = self._factors(step), self.tally.nothing()
        for part in micro_batches(
            [self.train.costs[position] for position in own], self.budget, self.model.pad_tolerance
        ):
            self.computing = [own[place] for place in part]
            losses = answer_losses(self.model, [examples[place] for place in part], self.config.losses)
            factor_B = on_device([factors[own[place]] for place in part], self.model.device)
            loss = (losses.weighted_sum(self.config.losses) * factor_B).sum()
            loss.backward()
            total += loss.detach()
            sums_N += self.tally.by_task(losses, [examples[place].task for place in part])
        return total, sums_N

    def _compute_less(self, costs: Sequence[Cost], count: int) -> None:
        """Halve the token budget, below what did not fit: `count` examples at once, of such costs.

        Raises:
            OutOfMemory: it was one by itself.
        """
        longest = max(map(sum, costs))
        if count == 1:
            raise memory.one_at_a_time(longest)
        said = f"out of memory with {count} examples at a time"
        self._keep_budget(max(1, min(self.budget, longest * count) // 2), said)

    def _note(self, made: Step) -> None:
        """Count a step that was made."""
        state = self.state
        state.step, state.total_steps = state.step + 1, state.total_steps + 1
        self.tally.unread.append(made)
        if state.total_steps % LOG_EVERY == 0:
            total = self.tally.read(state.sums)
            self._log({"train_loss_step": total, "learning_rate": self.schedule.get_last_lr()[0]})

    def _agree(self) -> None:
        """Agree with the other workers on what comes after the step.

        Whoever is asked to end, all end, after the same step; and the clock of rank 0 counts for all.
        """
        due = self.rank == 0 and time.monotonic() - self.since >= self.config.checkpoint_seconds
        self.stop, self.due = any_worker(self.interrupted(), due)

    def finish_epoch(self) -> dict[str, Any]:
        """Evaluate, write the checkpoint, and return what to report.

        Raises:
            Interrupted: the steps of the epoch are in the checkpoint, and the evaluation is done again.
        """
        self.end_if_asked()
        state, last = self.state, self.state.epoch + 1 == self.config.epochs
        # No more than the first read task has: one that is under way when the trial is pruned takes its process along.
        self.begun = None if last else self._ask(state.epoch + 1, last=FIRST_STEPS)
        records = self._validate()
        state.epoch, state.step = state.epoch + 1, 0
        self._count_time()
        metrics: dict[str, Any] = {
            **self._measure(records),
            **means(state.sums, next(iter(self.model.tasks))),
            "epoch": state.epoch,
            "steps": state.total_steps,
            "seconds": state.seconds,
            "data_wait": state.data_wait,
            "dropped_turns": self.data.dropped_turns,
            "short_clips": self.data.short_clips,
        }
        state.sums = {}
        state.history.append((state.epoch, metrics))
        state.ends.append(state.examples)
        state.times.append(time.time())
        # In this order: a checkpoint has its predictions, and of an epoch in it the curve is mended by `resume`.
        self._write_predictions(records)
        self.save()
        self._log_epoch(-1)
        self._log_usage(once=True)
        return metrics

    def _validate(self) -> list[Record]:
        """The records of the validation split, with as much at once as fits into memory."""
        # Workers have batches of their own in an evaluation, so several of them cannot agree on where to end.
        between = self.end_if_asked if self.world == 1 else never
        while True:
            asked = self.validation or ask(self.model, self.data, "val", self.budget)
            self.validation = None
            try:
                records = evaluate(self.model, self.data, "val", self.budget, asked=asked, between=between)
                self.state.data_wait += asked.reading.waited
                return records
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
                asked.reading.close()
                self._compute_less(self.data.splits["val"].costs, max(map(len, asked.batches)))
                if self.world > 1:
                    raise
            memory.free()

    def _measure(self, records: Sequence[Record]) -> dict[str, float]:
        """Validation metrics; with several tasks also the weighted sum of their losses."""
        found = summarise(records, self.labels, self.data.shards.manifest.roles)
        if len(self.labels) > 1:
            names = ["loss", *(f"{task}/loss" for task in list(self.labels)[1:])]
            weights = [self.task_weights[task] for task in self.labels]
            found["total_loss"] = sum(weight * found[name] for weight, name in zip(weights, names, strict=True))
        return found


def fit(
    model: SpeechLLM,
    data: TrialData,
    config: TrainConfig,
    tasks: TaskWeights,
    seed: int,
    folder: Path,
    report: Report,
    interrupted: Callable[[], bool] = never,
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
        interrupted: whether the training shall end; asked in every worker after each step, and between the batches of
            an evaluation where there is one worker. It costs what a call costs, so it should only look at a flag.

    Raises:
        Interrupted: as asked; everything that was done is in the checkpoint.
        Superseded: a later attempt at this trial has begun; nothing was written since.
        NonFiniteError: before an update with a loss or gradient that is not finite.
        OutOfMemory: an example does not fit by itself.
        StorageError: the folder cannot be written; the former checkpoint is as it was.
        CheckpointError: the checkpoint in `folder` belongs to another model or batch plan.
    """
    trainer = Trainer(model, data, config, tasks, seed, folder, interrupted)
    trainer.resume()
    for epoch, metrics in list(trainer.state.history):
        report(epoch, metrics)
    try:
        while not trainer.is_over():
            trainer.train_epoch()
            metrics = trainer.finish_epoch()
            report(trainer.state.epoch, metrics)
    finally:
        data.close()  # what was read ahead for an epoch that is not trained
    trainer.finish()
