"""Train one trial from its first or its last step to its end; the same loop under Ray, in `sweep train` and in tests.

`fit` tells it: load the newest checkpoint, then for every epoch make its steps, evaluate, write the checkpoint and the
metrics log, and report.

Shapes: B examples of a micro-batch, N sums of losses (see `loss_accumulator`).
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from data.config import TaskWeights
from data.loading.augment import AugmentSeed
from data.loading.batching import Cost, plan, plan_hash, share
from data.loading.examples import Example
from data.loading.ray_source import FIRST_STEPS
from model.checkpoints.checkpoint import CheckpointError, CheckpointState, KeptWeights, restore, trained_tensors
from model.checkpoints.fingerprint import digest
from model.compat import skip_steps_if
from model.config import TrainConfig
from model.evaluation.evaluator import PendingBatches, evaluate, request_batches
from model.evaluation.metrics import Record, summarise
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import resolve_balanced, weigh_targets, weights_by_item
from model.objectives.losses import answer_losses
from model.runtime import memory
from model.runtime.device import on_device, uploaded
from model.runtime.distributed import any_worker, barrier, gather, sum_gradients, world
from model.runtime.system_metrics import SystemMetrics
from model.speech_llm.speech_llm import SpeechLLM
from model.training.checkpoint_writer import CheckpointWriter
from model.training.loss_accumulator import LossAccumulator, Step, means
from model.training.optimizer import make_optimizer, make_schedule
from model.training.progress import LOWEST_LOSS, Metrics, Objective, Progress, best_epoch
from model.training.random_state import get_random_state, kept_random_state, set_random_state
from model.training.run_folder import RunFolder

Report = Callable[[int, Metrics], None]
LOG_EVERY = 10  # optimizer steps between two points of the training loss; none of them waits for the device


class TrialInterrupted(BaseException):
    """Signals that the training was asked to end; the checkpoint contains everything that was done.

    It derives from BaseException, as KeyboardInterrupt does: an `except Exception` must not take it for an error. The
    caller of `fit` catches it.
    """


def never() -> bool:
    """Return False: nothing asks the training to end."""
    return False


def fit(
    model: SpeechLLM,
    data: TrialData,
    config: TrainConfig,
    tasks: TaskWeights,
    seed: int,
    folder: Path,
    report: Report,
    interrupted: Callable[[], bool] = never,
    objective: Objective = LOWEST_LOSS,
) -> None:
    """Train a model to the end, from the checkpoint in `folder` on if there is one.

    Args:
        model: freshly made under `seed`.
        data: with the splits train and val.
        config: of the training.
        tasks: weights of the model's tasks.
        seed: of the batch plan.
        folder: see `RunFolder`.
        report: called with (epoch, metrics) after every epoch, and again for those before a resume; it may raise to
            stop the trial.
        interrupted: returns whether the training must end. Every worker calls it after each step, and a single worker
            also between the batches of an evaluation, so it should only look at a flag.
        objective: chooses the best epoch, with `train.keep: best`.

    Raises:
        TrialInterrupted: `interrupted` returned True; everything that was done is in the checkpoint.
        StaleAttemptError: a later attempt at this trial has begun; nothing was written since.
        NonFiniteError: a loss or gradient was not finite; no step was made with it.
        OutOfMemoryError: an example does not fit by itself.
        StorageError: the folder cannot be written; the former checkpoint is unchanged.
        CheckpointError: the checkpoint in `folder` belongs to another model or batch plan.
    """
    trainer = Trainer(model, data, config, tasks, seed, folder, interrupted, objective)
    trainer.resume()
    for epoch, metrics in list(trainer.progress.history):
        report(epoch, metrics)
    try:
        while not trainer.is_over():
            trainer.train_epoch()
            metrics = trainer.finish_epoch()
            report(trainer.progress.epoch, metrics)
    finally:
        data.close()  # stops reading ahead for an epoch that is not trained
        trainer.writer.close()
    trainer.folder.finish()


class Trainer:
    """The loop of `fit`, with its optimizer, schedule and progress; see `fit` for the arguments."""

    def __init__(
        self,
        model: SpeechLLM,
        data: TrialData,
        config: TrainConfig,
        tasks: TaskWeights,
        seed: int,
        folder: Path,
        interrupted: Callable[[], bool] = never,
        objective: Objective = LOWEST_LOSS,
    ) -> None:
        self.model, self.data, self.config = model, data, resolve_balanced(config, model.tasks)
        self.seed, self.interrupted, self.objective = seed, interrupted, objective
        self.rank, self.workers = world()
        self.folder = RunFolder(folder)
        self.writer = CheckpointWriter(self.folder)
        self.progress = Progress()
        self.kept: KeptWeights | None = None  # of the best epoch; rank 0 has those of this attempt
        self.saved_steps = 0  # that the checkpoint contains
        self.token_budget = config.initial_token_budget  # halved when memory runs out
        self.labels = {task: answers.labels for task, answers in model.tasks.items()}
        self.task_weights: dict[str, float] = {task: getattr(tasks, task) for task in model.tasks}

        self.train = data.splits["train"]
        self.epoch_steps = math.ceil(len(self.train.items) / config.batch_size)
        items, answers = self.train.items, self.train.answers
        self.item_weights, self.targets = weigh_targets(self.config.class_weights, items, answers, self.train.targets)
        self.sampling_weights = weights_by_item(self.config.sampling, items, answers)
        fingerprint = data.shards.fingerprint
        self.plan_hash = plan_hash(
            self.train.costs, fingerprint, config.batch_size, seed, weights=self.sampling_weights
        )
        self.next_steps: PendingBatches | None = None  # the first steps of the next epoch
        self.validation: PendingBatches | None = None

        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config, config.epochs * self.epoch_steps)
        self.losses = LossAccumulator(list(model.tasks), config.losses, model.device)
        self.non_finite = torch.zeros((), device=model.device)  # 1 after a step that is not finite: no more are made
        skip_steps_if(self.non_finite, self.optimizer)

        self.must_stop = self.checkpoint_due = False  # what all workers agreed on after the last step
        self.checkpoint_time = time.monotonic()  # of the last checkpoint, or the start of the epoch
        self.counted_time = self.checkpoint_time  # `progress.seconds` counts the time up to here
        self.computing: list[int] = []  # positions of the micro-batch that is computed
        self.system_metrics = SystemMetrics(model.device)

    # Load the checkpoint

    def resume(self) -> None:
        """Begin an attempt, and continue from the newest intact checkpoint, if there is one.

        Raises:
            CheckpointError: it belongs to another model or another batch plan.
            OtherBaseError: it was trained on another base model.
            StorageError: the folder cannot be used.
        """
        newest, token_budget = self.folder.open()
        if token_budget is not None:
            self.token_budget = min(self.token_budget, token_budget)
        if newest is None:
            return
        name, state = newest
        if state["plan_hash"] != self.plan_hash:
            raise CheckpointError(
                f"{self.folder.path / name}: made on other data or with another batch size or seed; use another folder"
            )
        restore(self.model, state, str(self.folder.path / name))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        set_random_state(state["generators"][min(self.rank, len(state["generators"]) - 1)])
        self.progress, self.kept = Progress(**state["progress"]), state.get("kept")
        self.saved_steps = self.progress.total_steps
        logged = {line.epoch for line in self.folder.metrics.lines()} if self.rank == 0 else set()
        for index, (epoch, _) in enumerate(self.progress.history):
            if epoch not in logged:  # the last attempt was killed between its checkpoint and the line
                self._log_epoch(index)

    def is_over(self) -> bool:
        """Return whether all epochs are trained, or the validation loss has not fallen for `patience` of them."""
        progress, patience = self.progress, self.config.patience
        if progress.epoch >= self.config.epochs:
            return True
        if patience is None or not progress.history:
            return False
        losses = [metrics.get("total_loss", metrics["loss"]) for _, metrics in progress.history]
        best = min(range(len(losses)), key=lambda index: (not math.isfinite(losses[index]), losses[index]))
        return len(losses) - 1 - best >= patience

    # Make the steps of an epoch

    def train_epoch(self) -> None:
        """Make the remaining steps of the current epoch.

        Raises:
            TrialInterrupted: after a checkpoint of the last step.
        """
        progress = self.progress
        self.counted_time = time.monotonic()
        self.end_if_asked()
        self.model.augment = (self.seed, progress.epoch)
        parts = [self.next_steps] if self.next_steps else []
        first = len(self.next_steps.batches) if self.next_steps else progress.step
        if first < self.epoch_steps:
            parts.append(self._request_steps(progress.epoch, first))
        self.validation = request_batches(self.model, self.data, "val", self.token_budget)
        self.model.train()
        self.checkpoint_time = time.monotonic()
        for steps, reader in parts:
            for step, examples in zip(steps, uploaded(reader, self.model.device), strict=True):
                progress.examples += len(step)
                self.optimizer_step(step, share(step, self.rank, self.workers), examples)
                if self.must_stop or self.checkpoint_due or progress.total_steps % self.config.checkpoint_steps == 0:
                    self.save()
                    self.checkpoint_time = time.monotonic()
                if self.must_stop:
                    self._end()
            progress.data_wait += reader.waited
        self.losses.read(progress.sums)

    def _request_steps(self, epoch: int, first: int = 0, last: int | None = None) -> PendingBatches:
        """Start to read this worker's part of the steps of an epoch."""
        size, weights = self.config.batch_size, self.sampling_weights
        steps = plan(self.train.costs, batch_size=size, seed=self.seed, epoch=epoch, weights=weights)[first:last]
        parts = [share(step, self.rank, self.workers) for step in steps]
        return PendingBatches(steps, self.data.read("train", parts, AugmentSeed(self.seed, epoch)))

    def optimizer_step(self, step: Sequence[int], part: Sequence[int], examples: Sequence[Example]) -> None:
        """Make an optimizer step. Nothing here waits for the device.

        The optimizer skips a step that is not finite by itself, and the loss accumulator reports it when it is read.

        Args:
            step: positions of the training split, of all workers.
            part: those of this worker.
            examples: of `part`.
        """
        self.writer.check()
        total, sums_N = self._gradients(step, part, examples)
        # If one worker is asked to end, all end after the same step. The clock of rank 0 counts for all.
        is_due = self.rank == 0 and time.monotonic() - self.checkpoint_time >= self.config.checkpoint_seconds
        self.must_stop, self.checkpoint_due = any_worker(self.interrupted(), is_due)
        total = sum_gradients(self.parameters, total)
        with memory.required_for("the step of the optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            self.non_finite.logical_or_(~(total + norm).isfinite())
            self.optimizer.step()
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._record_step(Step(self.progress.total_steps + 1, rate, self._tokens(step), total, norm, sums_N))

    def _gradients(
        self, step: Sequence[int], part: Sequence[int], examples: Sequence[Example]
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of this worker's part of a step, with a smaller token budget until it fits.

        Returns:
            The loss of the part, and the sums_N of all losses.
        """
        random_state = get_random_state()
        while True:
            try:
                return self._backward(step, part, examples)
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
                self._halve_token_budget([[self.train.costs[position] for position in self.computing]])
                if self.workers > 1:  # the others wait for this one: the group starts again with the new budget
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            memory.free()
            set_random_state(random_state)

    def _backward(self, step: Sequence[int], part: Sequence[int], examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Compute the gradients of this worker's part of a step, in micro-batches.

        The loss of each task is the mean over its predicted tokens in the whole step, times the task's weight. The
        divisors follow from the plan, so they are the same for every worker and every cut into micro-batches. Class
        weights (balanced ones are 1 on average over the corpus) are not part of the divisors: in a step of one item
        they would cancel. Where annotators disagree, the tokens are those of the majority's label, so an item counts as
        much as with train.labels=majority.
        """
        tokens, (total, sums_N) = self._tokens(step), self.losses.zeros()
        costs = [self.train.costs[position] for position in part]
        with self.model.keep_pace():
            for indices in self.model.micro_batches(costs, self.token_budget):
                self.computing = [part[index] for index in indices]
                targets = [self.targets[position] for position in self.computing]
                losses = answer_losses(self.model, [examples[index] for index in indices], self.config.losses, targets)
                factors = []
                for position in self.computing:
                    task = self.train.items[position][0]
                    factors.append(self.task_weights[task] * self.item_weights[position] / tokens[task])
                factor_B = on_device(factors, self.model.device)
                loss = (losses.weighted_sum(self.config.losses) * factor_B).sum()
                loss.backward()
                total += loss.detach()
                sums_N += self.losses.by_task(losses, [examples[index].task for index in indices])
        return total, sums_N

    def _tokens(self, step: Sequence[int]) -> dict[str, int]:
        """Return the predicted tokens of a step, by task."""
        tokens = dict.fromkeys(self.model.tasks, 0)
        for position in step:
            tokens[self.train.items[position][0]] += self.train.predicted[position]
        return tokens

    def _halve_token_budget(self, batches: Sequence[Sequence[Cost]]) -> None:
        """Halve the token budget, to less than the largest of these batches needs, one of which did not fit.

        Raises:
            OutOfMemoryError: they are single examples.
        """
        count = max(map(len, batches))
        if count == 1:
            raise memory.single_example_error(max(sum(cost) for batch in batches for cost in batch))
        needed = max(map(self.model.count_computed, batches))
        self.token_budget = max(1, min(self.token_budget, needed) // 2)
        cause = f"out of memory with {count} examples at a time"
        self.folder.lower_token_budget(self.token_budget, cause, self.progress.examples)

    def _record_step(self, step: Step) -> None:
        """Count a step that was made, and log the training loss at times."""
        progress = self.progress
        progress.step, progress.total_steps = progress.step + 1, progress.total_steps + 1
        self.losses.unread.append(step)
        if progress.total_steps % LOG_EVERY == 0:
            loss = self.losses.read(progress.sums)
            rate = float(self.schedule.get_last_lr()[0])
            self.folder.log({"train_loss_step": loss, "learning_rate": rate}, progress.examples)
            self._log_system_metrics()

    # Evaluate and report

    def finish_epoch(self) -> Metrics:
        """Evaluate, write the checkpoint and the metrics log, and return the metrics to report.

        Raises:
            TrialInterrupted: the steps of the epoch are in the checkpoint; the evaluation must be repeated.
        """
        self.end_if_asked()
        progress, is_last = self.progress, self.progress.epoch + 1 == self.config.epochs
        # No more than the first read task reads: a read task that runs when the trial is pruned ends its process, too.
        self.next_steps = None if is_last else self._request_steps(progress.epoch + 1, last=FIRST_STEPS)
        with kept_random_state():
            records = self.validate()
            validation_metrics = self._validation_metrics(records)
        progress.epoch, progress.step = progress.epoch + 1, 0
        self._count_time()
        metrics: Metrics = {
            **validation_metrics,
            **means(progress.sums, next(iter(self.model.tasks))),
            "epoch": progress.epoch,
            "steps": progress.total_steps,
            "seconds": progress.seconds,
            "data_wait": progress.data_wait,
            "dropped_turns": self.data.dropped_turns,
            "short_clips": self.data.short_clips,
        }
        progress.sums = {}
        progress.history.append((progress.epoch, metrics))
        progress.ends.append(progress.examples)
        progress.times.append(time.time())
        # The order matters: a checkpoint never lacks its predictions, and `resume` logs an epoch whose line is missing.
        curve = {epoch: values[self.objective.metric] for epoch, values in progress.history}
        if self.config.keep == "last" or best_epoch(curve, self.objective.maximize) == progress.epoch:
            self.folder.write_predictions(records, self.labels)
            self._keep_weights()
        self.save()
        self._finish_checkpoint()  # what is reported is in a complete checkpoint
        self._log_epoch(-1)
        self._log_system_metrics(at_least_once=True)
        return metrics

    def validate(self) -> list[Record]:
        """Return the records of the validation split, computed with a smaller token budget until it fits."""
        # Several workers have different batches in an evaluation, so they cannot agree on where to end.
        before_batch = self.end_if_asked if self.workers == 1 else never
        while True:
            pending = self.validation or request_batches(self.model, self.data, "val", self.token_budget)
            self.validation = None
            try:
                records = evaluate(
                    self.model, self.data, "val", self.token_budget, pending=pending, before_batch=before_batch
                )
                self.progress.data_wait += pending.reader.waited
                return records
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
                pending.reader.close()
                costs = self.data.splits["val"].costs
                self._halve_token_budget([[costs[position] for position in batch] for batch in pending.batches])
                if self.workers > 1:
                    raise
            memory.free()

    def _validation_metrics(self, records: Sequence[Record]) -> Metrics:
        """Return the validation metrics; with several tasks also `total_loss`, the weighted sum of their losses."""
        metrics = summarise(records, self.labels, self.data.shards.manifest.roles)
        if len(self.labels) > 1:
            names = ["loss", *(f"{task}/loss" for task in list(self.labels)[1:])]
            weights = [self.task_weights[task] for task in self.labels]
            metrics["total_loss"] = sum(weight * metrics[name] for weight, name in zip(weights, names, strict=True))
        return metrics

    def _log_epoch(self, index: int) -> None:
        """Log the metrics of an epoch of the history."""
        (epoch, metrics), progress = self.progress.history[index], self.progress
        self.folder.log_epoch(epoch, metrics, progress.ends[index], progress.times[index])

    def _log_system_metrics(self, at_least_once: bool = False) -> None:
        """Log them in a line of their own: the lines of steps are the same whenever the steps are made."""
        if self.rank == 0 and (values := self.system_metrics.sample(at_least_once)):
            self.folder.log(values, self.progress.examples)

    # Write the checkpoint

    def _keep_weights(self) -> None:
        """Copy the weights of the epoch that has just ended, which is the best one so far."""
        if self.config.keep == "best" and self.rank == 0:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in trained_tensors(self.model).items()}
            self.kept = KeptWeights(epoch=self.progress.epoch, tensors=tensors, digest=digest(tensors))

    def save(self) -> None:
        """Start to write the checkpoint, after all losses and gradients up to it proved finite.

        Raises:
            NonFiniteError: one was not finite; its step was not made.
            StaleAttemptError, StorageError: as `checkpoint.save`, of this checkpoint or of the one before.
        """
        self.losses.read(self.progress.sums)
        self._count_time()
        random_states = gather(get_random_state())
        if self.rank == 0:
            state: CheckpointState = {
                "tensors": trained_tensors(self.model),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "generators": random_states,
                "progress": {name: getattr(self.progress, name) for name in Progress.__dataclass_fields__},
                "plan_hash": self.plan_hash,
                "fingerprint": self.data.shards.fingerprint,
                "digest": "",  # of the copy that is written
                "parents": self.model.parents,
                "files": self.model.files,
                "bases": {setting: base.model_dump() for setting, base in self.model.bases.items()},
                "meaning": self.model.meaning(),
                "attempt": self.folder.lock.number,
                "kept": self.kept,
            }
            self.writer.write(state)
        self.saved_steps = self.progress.total_steps

    def _finish_checkpoint(self) -> None:
        """Wait until the checkpoint is complete.

        Raises:
            StaleAttemptError, StorageError: as `checkpoint.save`.
        """
        self.writer.wait()
        barrier()

    def _count_time(self) -> None:
        """Add the time since the last call: with every checkpoint, so that all attempts of a trial are counted."""
        now = time.monotonic()
        self.progress.seconds += now - self.counted_time
        self.counted_time = now

    def end_if_asked(self) -> None:
        """End between two steps, at a point that all workers reach.

        Raises:
            TrialInterrupted: a worker was asked to end; everything that was done is in the checkpoint.
        """
        if any_worker(self.interrupted())[0]:
            if self.saved_steps < self.progress.total_steps:
                self.save()
            self._end()

    def _end(self) -> NoReturn:
        self._finish_checkpoint()
        raise TrialInterrupted(f"ended after step {self.progress.total_steps}, which is in the checkpoint")
