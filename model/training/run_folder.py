"""The folder of a training: its checkpoints, metrics log, predictions and token budget, and the lock over them."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from model.checkpoints import checkpoint
from model.checkpoints.checkpoint import CheckpointState, NewestCheckpoint
from model.checkpoints.fencing import TrialLock
from model.evaluation.metrics import Record
from model.runtime.distributed import on_first_worker, world
from model.training.metrics_log import MetricsLog

PREDICTIONS = "predictions.json"  # of the epoch whose weights are the result
TOKEN_BUDGET = "token_budget"  # what fitted into memory, where that was less than train.token_budget


class Opened(NamedTuple):
    """What a training continues from."""

    checkpoint: NewestCheckpoint | None
    token_budget: int | None  # that earlier attempts came down to


class RunFolder:
    """Writes what a training keeps, and only while no later attempt at the trial has begun.

    Rank 0 writes all but the token budget, which any worker may lower.

    Args:
        path: of the folder, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rank, _ = world()
        self.metrics = MetricsLog(path)
        self._lock: TrialLock | None = None

    @property
    def lock(self) -> TrialLock:
        """The right to write; claimed by `open`, or else with the first write."""
        if self._lock is None:
            self._lock = TrialLock.claim(self.path)
        return self._lock

    @property
    def checkpoint_path(self) -> Path:
        """The path of the checkpoint."""
        return self.path / checkpoint.FILE

    def open(self) -> Opened:
        """Begin an attempt, and return what it continues from. All workers must call this.

        Raises:
            CheckpointError: another worker cannot read the checkpoint that rank 0 found intact.
            StorageError: the folder cannot be used.
        """
        newest: list[NewestCheckpoint] = []  # rank 0 reads the checkpoint while it looks for an intact one

        def begin() -> tuple[int, str | None, int | None]:
            self._lock = TrialLock.claim(self.path)
            intact, warnings = checkpoint.newest(self.path)
            newest.extend([intact] if intact else [])
            for warning in warnings:
                self.warn(warning, step=0)
            return self._lock.number, intact and intact.name, self._read_token_budget()

        number, name, token_budget = on_first_worker(begin)
        self._lock = TrialLock(self.path, number)
        if name is not None and not newest:
            newest.append(NewestCheckpoint(name, checkpoint.load(self.path / name)))
        return Opened(newest[0] if newest else None, token_budget)

    def save(self, state: CheckpointState) -> None:
        """Write the checkpoint. Call it on rank 0.

        Raises:
            StaleAttemptError, StorageError: as `checkpoint.save`.
        """
        with self.lock.writing():
            self.metrics.sync()  # the metrics log has every step of the checkpoint
        checkpoint.save(self.checkpoint_path, state, self.lock)

    def finish(self) -> None:
        """Remove the previous checkpoint: a trial that is over never continues from it."""
        if self.rank == 0:
            with self.lock.writing():
                self.checkpoint_path.with_name(checkpoint.PREVIOUS).unlink(missing_ok=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append a point to the metrics log; `step` is the number of training examples seen."""
        if self.rank == 0:
            self._append(values, step)

    def log_epoch(self, epoch: int, metrics: Mapping[str, float], step: int, ended: float) -> None:
        """Append the metrics of an epoch to the metrics log.

        Args:
            epoch: from 1.
            metrics: that were reported.
            step: training examples seen at its end.
            ended: its time of day.
        """
        if self.rank == 0:
            values = {name: value for name, value in metrics.items() if name not in ("epoch", "steps")}
            self._append(values, step, ended, epoch)

    def warn(self, note: str, step: int) -> None:
        """Log a warning, and append it to the metrics log."""
        logging.getLogger(__name__).warning(note)
        self._append({}, step, note=note)

    def _append(
        self,
        values: Mapping[str, float],
        step: int,
        measured: float | None = None,
        epoch: int | None = None,
        note: str | None = None,
    ) -> None:
        measured = time.time() if measured is None else measured
        attempt = self.lock.number
        with self.lock.writing():
            self.metrics.append(values, time=measured, step=step, attempt=attempt, epoch=epoch, note=note)

    def write_predictions(self, records: Sequence[Record], labels: Mapping[str, Sequence[str]]) -> None:
        """Replace the predictions by those of an evaluation; `labels` has the labels of each task."""
        if self.rank == 0:
            content = {"labels": labels, "records": [record.as_dict() for record in records]}
            self.lock.replace(PREDICTIONS, json.dumps(content))

    def lower_token_budget(self, budget: int, cause: str, step: int) -> None:
        """Keep a token budget for later attempts, and warn about it; any worker may call this."""
        kept = self._read_token_budget()
        self.lock.replace(TOKEN_BUDGET, str(budget if kept is None else min(budget, kept)))
        self.warn(f"{cause}; train.token_budget is {budget} from now on, which changes no result without dropout", step)

    def _read_token_budget(self) -> int | None:
        path = self.path / TOKEN_BUDGET
        return int(path.read_text()) if path.exists() else None
