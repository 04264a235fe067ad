"""The ledger: a persistent Optuna study that is the single source of truth about the trials of a sweep.

Ray Tune executes and MLflow shows, but what was asked, reported and decided stands here, and survives any kill.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from data.errors import UserError
from sweep.config import Config
from sweep.settings import flat
from sweep.space import better, is_rung, prune

State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL"]
FILE = "study.journal"


@dataclass(frozen=True)
class Entry:
    """What the ledger says about a trial."""

    number: int
    state: State
    params: dict[str, Any]
    value: float | None  # of the objective, at the last reported epoch
    metrics: dict[str, Any]  # of the last reported epoch
    steps: int  # optimizer steps done
    curve: dict[int, float]  # objective by epoch
    why: str  # how the trial ended, in words


class Ledger:
    """The trials of a sweep. One process writes (the driver, which holds the folder's lock); any may read."""

    def __init__(self, folder: Path, config: Config, study: optuna.Study) -> None:
        self.folder = folder
        self.config = config
        self.study = study

    @classmethod
    def open(cls, folder: Path, config: Config) -> "Ledger":
        """Open or create the ledger for writing; only the holder of the folder's lock may do this."""
        path = folder / FILE
        # Nobody else writes, so a lock file here is what a killed driver left, and so is half a line at the end.
        for leftover in folder.glob(f"{FILE}.lock*"):
            leftover.unlink(missing_ok=True)
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = _storage(path)
        known = optuna.get_all_study_names(storage)  # asking first, so that opening a finished sweep writes nothing
        study = (
            optuna.load_study(study_name=config.name, storage=storage)
            if config.name in known
            else optuna.create_study(study_name=config.name, storage=storage, direction=config.search.direction)
        )
        return cls(folder, config, study)

    @classmethod
    def read(cls, folder: Path, config: Config) -> "Ledger":
        """Open an existing ledger to look at it, also while a driver writes it.

        Raises:
            UserError: the folder holds none.
        """
        path = folder / FILE
        if not path.exists():
            raise UserError(f"{folder}: no trial has started yet; start with `sweep run`")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return cls(folder, config, optuna.load_study(study_name=config.name, storage=_storage(path)))

    def ask(self, busy: Sequence[int], target: int) -> tuple[int, dict[str, Any]] | None:
        """The next trial to run: one that a former attempt left unfinished, else a new one.

        Args:
            busy: numbers of the trials that run now.
            target: trials in all.

        Returns:
            Number and values by dotted key; None when there is nothing left to start.
        """
        trials = self.study.get_trials(deepcopy=False)
        orphans = [trial for trial in trials if trial.state == TrialState.RUNNING and trial.number not in busy]
        if orphans:
            self._seed(orphans[0].number)
            trial = Trial(self.study, orphans[0]._trial_id)
        elif sum(trial.state != TrialState.WAITING for trial in trials) < target:
            trial = self._new(trials)
        else:
            return None
        return trial.number, self.config.search.suggest(trial, flat(self.config))

    def _new(self, trials: list[FrozenTrial]) -> Trial:
        queued = sum("fixed_params" in trial.system_attrs for trial in trials)
        for point in self.config.search.points[queued:]:
            self.study.enqueue_trial(point)
        trials = self.study.get_trials(deepcopy=False)
        waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
        self._seed(min(waiting, default=len(trials)))
        return self.study.ask()

    def _seed(self, number: int) -> None:
        """A sampler of the trial's own, so that a resumed search draws what an uninterrupted one would."""
        self.study.sampler = optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0]),
            n_startup_trials=self.config.search.startup_trials,
            constant_liar=True,
            multivariate=True,
            group=True,
        )

    def report(self, number: int, epoch: int, metrics: dict[str, Any]) -> bool:
        """Note an epoch of a running trial; epochs known already change nothing.

        Returns:
            Whether the trial ends here, which is then told already.
        """
        frozen = self._frozen(number)
        if frozen.state != TrialState.RUNNING:
            return True
        search = self.config.search
        trial, value = Trial(self.study, frozen._trial_id), float(metrics[search.metric])
        if epoch not in frozen.intermediate_values:
            trial.set_user_attr("metrics", metrics)
            trial.report(value, epoch)
        rule, last = search.pruning, frozen.params.get("train.epochs", self.config.train.epochs)
        decided = epoch <= frozen.user_attrs.get("passed", 0)  # told again after a resume
        if rule is None or decided or epoch >= last or not is_rung(epoch, rule):
            return False
        peers = [
            other.intermediate_values[epoch]
            for other in self.study.get_trials(deepcopy=False)
            if epoch in other.intermediate_values
        ]
        if not prune(value, peers, search.direction, rule):
            trial.set_user_attr("passed", epoch)
            return False
        place = 1 + sum(better(peer, value, search.direction) for peer in peers)
        trial.set_user_attr("why", f"pruned at epoch {epoch}: {place}. of {len(peers)} by {search.metric}")
        self.study.tell(number, state=TrialState.PRUNED)
        return True

    def bind(self, fingerprint: str) -> None:
        """Hold the sweep to one corpus.

        Raises:
            UserError: it was started on another one.
        """
        known = self.study.user_attrs.get("fingerprint")
        if known is None:
            self.study.set_user_attr("fingerprint", fingerprint)
        elif known != fingerprint:
            raise UserError(
                f"{self.folder}: started on the corpus {known}, and data.shards is now {fingerprint}; "
                "put the former shards back, or use --out for a new sweep"
            )

    def complete(self, number: int) -> None:
        """The trial trained to its end; its value is that of its last epoch."""
        frozen = self._frozen(number)
        value = frozen.intermediate_values[max(frozen.intermediate_values)]
        if math.isfinite(value):
            self.study.tell(number, value)
        else:
            self.fail(number, f"the {self.config.search.metric} of the last epoch is not finite")

    def fail(self, number: int, why: str) -> None:
        """The trial cannot be finished, for this reason."""
        frozen = self._frozen(number)
        if frozen.state == TrialState.RUNNING:
            Trial(self.study, frozen._trial_id).set_user_attr("why", why)
            self.study.tell(number, state=TrialState.FAIL)

    def entries(self) -> list[Entry]:
        """Every trial that was started, by number."""
        trials = self.study.get_trials(deepcopy=False)
        return [_entry(trial) for trial in trials if trial.state != TrialState.WAITING]

    def best(self) -> Entry | None:
        """The complete trial with the best value; on a tie the earlier one."""
        done = [entry for entry in self.entries() if entry.state == "COMPLETE" and entry.value is not None]
        sign = -1 if self.config.search.direction == "maximize" else 1
        return min(done, key=lambda entry: (sign * (entry.value or 0.0), entry.number), default=None)

    def trial_config(self, entry: Entry) -> Config:
        """The configuration of one trial: the sweep's with the trial's values in place, and no search."""
        return trial_config(self.config, entry.params)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]


def trial_config(config: Config, values: dict[str, Any]) -> Config:
    """The configuration that reproduces a trial of a sweep by itself."""
    return config.with_values({**values, "search.space": {}, "search.points": []})


def is_drawn(folder: Path, entry: Entry) -> bool:
    """Whether all values of a trial are known: they are drawn one by one, and readers may look in between."""
    return entry.state != "RUNNING" or (trial_folder(folder, entry.number) / "config.yaml").exists()


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial of the sweep in `folder` keeps its checkpoint, curves and predictions."""
    return folder / "trials" / f"{number:04d}"


def _storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def _entry(trial: FrozenTrial) -> Entry:
    metrics = trial.user_attrs.get("metrics", {})
    curve = dict(sorted(trial.intermediate_values.items()))
    value = trial.value if trial.state == TrialState.COMPLETE else (curve[max(curve)] if curve else None)
    default = {"COMPLETE": "trained to the end", "RUNNING": "running"}.get(trial.state.name, "")
    return Entry(
        number=trial.number,
        state=trial.state.name,
        params=dict(trial.params),
        value=value,
        metrics=metrics,
        steps=int(metrics.get("steps", 0)),
        curve=curve,
        why=trial.user_attrs.get("why", default),
    )
