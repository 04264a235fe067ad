"""The half of the training loop that outlives its process: checkpoint, curves, predictions, and whose they are."""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.checkpoints import checkpoint
from model.checkpoints.fencing import TrialLock
from model.config import TrainConfig
from model.evaluation.metrics import Record
from model.evaluation.split_data import TrialData
from model.runtime.distributed import from_first, world
from model.runtime.system_metrics import SystemMetrics
from model.speech_llm.speech_llm import SpeechLLM
from model.training import metrics_log as curve
from model.training.random_state import generator_state, restore_generators

BUDGET = "token_budget"  # file: what fitted into memory, where that was less than train.token_budget


@dataclass
class Progress:
    """The state of the loop: everything of a run that is neither a weight nor a generator."""

    epoch: int = 0
    step: int = 0  # optimizer steps done in this epoch; all of them where only the evaluation is left
    total_steps: int = 0
    examples: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)  # of this epoch: loss → [sum, predicted tokens]
    seconds: float = 0.0  # of training and evaluation, of all attempts up to their checkpoints
    data_wait: float = 0.0  # those of them for which the next batch was waited for
    history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # what was reported, by epoch
    ends: list[int] = field(default_factory=list)  # `examples` at the end of each epoch of the history
    times: list[float] = field(default_factory=list)  # and the time of day


class Resumable:
    """What `Trainer` keeps in its folder. Rank 0 writes, and only while no later attempt at the trial has begun."""

    def __init__(self, model: SpeechLLM, data: TrialData, config: TrainConfig, folder: Path) -> None:
        self.model, self.data, self.config, self.folder = model, data, config, folder
        self.rank, self.world = world()
        self.labels = {task: known.labels for task, known in model.tasks.items()}
        self.optimizer: torch.optim.Optimizer
        self.schedule: Any
        self.plan_hash: str
        self.state = Progress()
        self.budget = config.token_budget  # in effect
        self.saved = 0  # steps that the checkpoint holds
        self.usage = SystemMetrics(model.device)
        self._attempt: TrialLock | None = None

    @property
    def attempt(self) -> TrialLock:
        """The right to write; claimed by `resume`, or else with the first write."""
        if self._attempt is None:
            self._attempt = TrialLock.claim(self.folder)
        return self._attempt

    @property
    def path(self) -> Path:
        """Where the checkpoint of this trial is."""
        return self.folder / checkpoint.FILE

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
        """Write the checkpoint; generators of every worker are in it.

        Raises:
            Superseded, StorageError: as `checkpoint.save`.
        """
        generators: list[Any] = [generator_state()]
        if self.world > 1:
            generators = [None] * self.world
            dist.all_gather_object(generators, generator_state())
        if self.rank == 0:
            tensors = checkpoint.trained_tensors(self.model)
            state = {
                "tensors": tensors,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "generators": generators,
                "progress": {name: getattr(self.state, name) for name in Progress.__dataclass_fields__},
                "plan_hash": self.plan_hash,
                "fingerprint": self.data.shards.fingerprint,
                "digest": checkpoint.digest(tensors),
                "parents": self.model.parents,
                "files": self.model.files,
                "meaning": self.model.meaning(),
                "attempt": self.attempt.number,
            }
            with self.attempt.writing():
                curve.sync(self.folder / curve.FILE)  # no step of a checkpoint is missing in the curves
            checkpoint.save(self.path, state, self.attempt)
        self.saved = self.state.total_steps
        if self.world > 1:
            dist.barrier()

    def resume(self) -> None:
        """Begin an attempt, and continue from the newest whole checkpoint, if there is one.

        Raises:
            CheckpointError: it belongs to another model or another batch plan.
            StorageError: the folder cannot be used.
        """
        held: dict[str, Any] = {}  # rank 0 reads the checkpoint while it looks for one that is whole

        def begin() -> tuple[int, str | None, int]:
            attempt = self._attempt = TrialLock.claim(self.folder)
            name, state, notes = checkpoint.newest(self.folder)
            held.update(state)
            for note in notes:
                self._tell(note)
            return attempt.number, name, self._kept_budget()

        number, name, kept = from_first(begin)
        self._attempt, self.budget = TrialLock(self.folder, number), min(self.budget, kept)
        if name is not None:
            self._restore(self.folder / name, held or checkpoint.load(self.folder / name))

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        if state["plan_hash"] != self.plan_hash:
            raise checkpoint.CheckpointError(
                f"{path}: made on other data or with another batch size or seed; use another folder"
            )
        checkpoint.restore(self.model, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        restore_generators(state["generators"][min(self.rank, len(state["generators"]) - 1)])
        self.state = Progress(**state["progress"])
        self.saved = self.state.total_steps
        if self.rank == 0:  # killed between the checkpoint and the curve
            told = curve.epochs(self.folder / curve.FILE)
            for place, (epoch, _) in enumerate(self.state.history):
                if epoch not in told:
                    self._log_epoch(place)

    def finish(self) -> None:
        """The trial is over: nothing goes on from a checkpoint before the last one."""
        if self.rank == 0:
            with self.attempt.writing():
                self.path.with_name(checkpoint.PREVIOUS).unlink(missing_ok=True)

    def _kept_budget(self) -> int:
        path = self.folder / BUDGET
        return int(path.read_text()) if path.exists() else self.budget

    def _keep_budget(self, budget: int, why: str) -> None:
        """From now on, and in later attempts, no more than this is computed at once; any worker may say so."""
        self.budget = budget
        self.attempt.replace(BUDGET, str(min(budget, self._kept_budget())))
        self._tell(f"{why}; train.token_budget is {budget} from here on, which changes no result without dropout")

    def _tell(self, note: str) -> None:
        """Say something in the log, and keep it beside the curves."""
        logging.getLogger(__name__).warning(note)
        self._append({"values": {}, "note": note})

    def _log(self, values: dict[str, float]) -> None:
        """Add a point to the trial's curve."""
        if self.rank == 0:
            self._append({"values": values})
            self._log_usage()

    def _log_usage(self, once: bool = False) -> None:
        """Add what the machine does, in a line of its own: the steps' own lines are the same whenever they are made."""
        if self.rank == 0 and (values := self.usage.sample(once)):
            self._append({"values": values})

    def _log_epoch(self, place: int) -> None:
        """Add the end of an epoch, by its place in the history, to the curve."""
        epoch, metrics = self.state.history[place]
        values = {name: value for name, value in metrics.items() if name not in ("epoch", "steps")}
        mark = {"time": self.state.times[place], "step": self.state.ends[place]}
        if self.rank == 0:
            self._append(mark | {"epoch": epoch, "values": values})

    def _append(self, line: dict[str, Any]) -> None:
        common = {"time": time.time(), "step": self.state.examples, "attempt": self.attempt.number}
        with self.attempt.writing():
            curve.append(self.folder / curve.FILE, common | line)

    def _write_predictions(self, records: Sequence[Record]) -> None:
        if self.rank == 0:
            content = {"labels": self.labels, "records": [record.as_dict() for record in records]}
            self.attempt.replace("predictions.json", json.dumps(content))
