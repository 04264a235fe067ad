"""The ledger: a persistent Optuna study that is the single source of truth about the trials of a sweep.

Ray Tune executes and MLflow shows, but what was asked, reported and decided stands here, and survives any kill.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from data.errors import UserError
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.space import EPOCHS
from sweep.search import sampler as draw
from sweep.search.pruning import better, is_audited, prune
from sweep.search.study_storage import open_study, read_study

State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL"]
Reason = Literal["non-finite", "out of memory", "bad data", "workers lost", "error"]
FAULTY = 3  # failures alike, and nothing else, after which a sweep is called faulty
FAULTY_BY_PARAMETERS = 6  # of a kind that other parameters may avoid
BY_PARAMETERS = ("non-finite", "out of memory")


@dataclass(frozen=True)
class TrialRecord:
    """What the ledger says about a trial."""

    number: int
    state: State
    params: dict[str, Any]
    value: float | None  # of the objective, at the last reported epoch
    metrics: dict[str, Any]  # of the last reported epoch
    steps: int  # optimizer steps done
    curve: dict[int, float]  # objective by epoch
    why: str  # how the trial ended, in words
    reason: Reason | None = None  # of a failure
    audited: bool = False  # never pruned
    spared: int | None = None  # the epoch at which an audited trial would have been pruned


class StudyStore:
    """The trials of a sweep. One process writes (the driver, which holds the folder's lease); any may read."""

    def __init__(self, folder: Path, config: Config, study: optuna.Study) -> None:
        self.folder = folder
        self.config = config
        self.study = study
        self.fits: draw.Fits = lambda values: True  # whether a new trial may start; see `sweep.planner`
        self._ended: dict[int, TrialRecord] = {}  # which do not change any more

    @classmethod
    def open(cls, folder: Path, config: Config) -> "StudyStore":
        """Open or create the ledger for writing; only the holder of the folder's lease may do this.

        Raises:
            UserError: the database of `storage.ledger` cannot be used.
        """
        return cls(folder, config, open_study(folder, config))

    @classmethod
    def read(cls, folder: Path, config: Config) -> "StudyStore":
        """Open an existing ledger to look at it, also while a driver writes it.

        Raises:
            UserError: there is none, or its database cannot be used.
        """
        return cls(folder, config, read_study(folder, config))

    @classmethod
    def of(cls, folder: Path) -> "StudyStore":
        """Open the ledger of the sweep in a folder to look at it, see `read`."""
        return cls.read(folder, load(str(folder / "config.yaml")))

    def ask(self, busy: Sequence[int], target: int) -> tuple[int, dict[str, Any]] | None:
        """The next trial to run: the first one that a former attempt left unfinished, else a new one.

        A new trial is written with all its values at once: a kill leaves it whole, or not at all.

        Args:
            busy: numbers of the trials that run now.
            target: trials in all.

        Returns:
            Number and values by dotted key; None when there is nothing left to start.

        Raises:
            UserError: nothing that is drawn fits into memory.
        """
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.number not in busy:
                return trial.number, draw.params(self.config, trial)
        if sum(trial.state != TrialState.WAITING for trial in trials) >= target:
            return None
        self.study.add_trial(draw.draw(self.config, trials, self.fits))
        return len(trials), draw.params(self.config, self._frozen(len(trials)))

    def running(self) -> list[int]:
        """Numbers of the trials that were started and have not ended."""
        trials = self.study.get_trials(deepcopy=False)
        return [trial.number for trial in trials if trial.state == TrialState.RUNNING]

    def points_left(self) -> list[dict[str, Any]]:
        """Points of the search that no trial has taken yet."""
        return draw.points_left(self.config, self.study.get_trials(deepcopy=False))

    def report(self, number: int, epoch: int, metrics: dict[str, Any]) -> bool:
        """Note an epoch of a running trial; an epoch that is known already changes nothing, whatever is told of it.

        Returns:
            Whether the trial ends here, which is then told already.
        """
        frozen = self._frozen(number)
        if frozen.state != TrialState.RUNNING:
            return True
        search, known = self.config.search, frozen.intermediate_values
        trial, value = Trial(self.study, frozen._trial_id), float(metrics[search.metric])
        if epoch in known:
            value = known[epoch]
        else:
            if epoch > max(known, default=0):  # a lost report that is told again is not the last word
                trial.set_user_attr("metrics", metrics)
            trial.report(value, epoch)
        return self._judge(frozen, trial, epoch, value)

    def _judge(self, frozen: FrozenTrial, trial: Trial, epoch: int, value: float) -> bool:
        """Whether a trial ends here. What is decided is written down in one piece, and is not decided again."""
        search, noted = self.config.search, frozen.user_attrs
        rule, last = search.pruning, horizon(self.config, draw.params(self.config, frozen))
        # Told again after a resume; or spared before, and what comes of that is no matter of rungs any more.
        decided = epoch <= noted.get("passed", 0) or "spared" in noted
        if rule is None or decided or epoch >= last or epoch not in search.rungs(self.config.train.epochs):
            return False
        peers = [
            other.intermediate_values[epoch]
            for other in self.study.get_trials(deepcopy=False)
            # Without the audit, one that was spared would not have come so far: it changes nothing for the others.
            if epoch in other.intermediate_values and epoch <= other.user_attrs.get("spared", epoch)
        ]
        if not prune(value, peers, search.direction, rule):
            trial.set_user_attr("passed", epoch)
            return False
        if is_audited(frozen.number, self.config.seed, rule.audit):
            trial.set_user_attr("spared", epoch)
            return False
        place = 1 + sum(better(peer, value, search.direction) for peer in peers)
        trial.set_user_attr("why", f"pruned at epoch {epoch}: {place}. of {len(peers)} by {search.metric}")
        self.study.tell(frozen.number, state=TrialState.PRUNED)
        return True

    def bind(self, fingerprint: str, code: str | None = None) -> str | None:
        """Hold the sweep to one corpus, and note the version of the code.

        Args:
            fingerprint: of the corpus.
            code: see `sweep.changes.code_version`.

        Returns:
            A note for the user where the code has changed since the last attempt.

        Raises:
            UserError: it was started on another corpus.
        """
        known = self.study.user_attrs.get("fingerprint")
        if known is None:
            self.study.set_user_attr("fingerprint", fingerprint)
        elif known != fingerprint:
            raise UserError(
                f"{self.folder}: started on another corpus (fingerprint: {known} → {fingerprint}); "
                "put the former data.shards back, or use --out for a new folder"
            )
        codes = self.codes()
        if code is None or codes[-1:] == [code]:
            return None
        self.study.set_user_attr("codes", [*codes, code])
        return f"code: {codes[-1]} → {code}; results may differ from those of earlier trials" if codes else None

    def fingerprint(self) -> str | None:
        """Of the corpus that the sweep is held to."""
        known: str | None = self.study.user_attrs.get("fingerprint")
        return known

    def codes(self) -> list[str]:
        """Versions of the code that worked on this sweep, in their order."""
        return list(self.study.user_attrs.get("codes", []))

    def complete(self, number: int) -> None:
        """The trial trained to its end; its value is that of its last epoch."""
        frozen = self._frozen(number)
        value = frozen.intermediate_values[max(frozen.intermediate_values)]
        if math.isfinite(value):
            self.study.tell(number, value)
        else:
            self.fail(number, f"the {self.config.search.metric} of the last epoch is not finite", reason="non-finite")

    def fail(self, number: int, why: str, reason: Reason = "error") -> None:
        """The trial cannot be finished. One that ended already stays as it is.

        Args:
            number: of the trial.
            why: for people.
            reason: the kind of failure; the search avoids parameters that ran out of memory.
        """
        frozen = self._frozen(number)
        if frozen.state == TrialState.RUNNING:
            trial = Trial(self.study, frozen._trial_id)
            trial.set_user_attr("why", why)
            trial.set_user_attr("reason", reason)
            self.study.tell(number, state=TrialState.FAIL)

    def trials(self) -> list[TrialRecord]:
        """Every trial that was started, by number."""
        trials = self.study.get_trials(deepcopy=False)
        return [self._entry(trial) for trial in trials if trial.state != TrialState.WAITING]

    def _entry(self, trial: FrozenTrial) -> TrialRecord:
        found = self._ended.get(trial.number) or _entry(self.config, trial)
        if trial.state.is_finished():
            self._ended[trial.number] = found
        return found

    def best(self) -> TrialRecord | None:
        """The complete trial with the best value; on a tie the earlier one."""
        return next(iter(best_first(self.config, self.trials())), None)

    def trial_config(self, entry: TrialRecord) -> Config:
        """The configuration of one trial: the sweep's with the trial's values in place, and no search."""
        return self.config.for_trial(entry.params)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]


def best_first(config: Config, entries: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The complete trials, best first; on a tie the earlier one."""
    done = [entry for entry in entries if entry.state == "COMPLETE" and entry.value is not None]
    sign = -1 if config.search.direction == "maximize" else 1
    return sorted(done, key=lambda entry: (sign * (entry.value or 0.0), entry.number))


def horizon(config: Config, params: Mapping[str, Any]) -> int:
    """The epochs that a trial with these values trains for, unless something ends it."""
    return int(params.get(EPOCHS, config.train.epochs))


def common_fault(entries: Sequence[TrialRecord]) -> str | None:
    """What hits every trial (a wrong path, a full disk), in a line; ask when a trial has just failed.

    It is a fault of the sweep if no trial ever came to an end of its own, and the last ones failed alike. Failures
    that other parameters may avoid need more of them.
    """
    ended = [entry for entry in entries if entry.state != "RUNNING"]
    if not ended or any(entry.state != "FAIL" for entry in ended):
        return None
    last = ended[-1]
    enough = FAULTY_BY_PARAMETERS if last.reason in BY_PARAMETERS else FAULTY
    alike = {(entry.reason, _masked(entry.why)) for entry in ended[-enough:]}
    if len(ended) < enough or len(alike) > 1:
        return None
    return f"the last {enough} trials failed alike and none was finished ({last.reason}: {last.why}); mend this first"


def _masked(why: str) -> str:
    """Without what tells one trial from another: numbers, and so folders and steps."""
    return re.sub(r"\d+", "#", why)


def is_drawn(folder: Path, entry: TrialRecord) -> bool:
    """Whether a trial has begun for those who look on: its folder is made right after it was written."""
    return entry.state != "RUNNING" or (trial_folder(folder, entry.number) / "config.yaml").exists()


def _entry(config: Config, trial: FrozenTrial) -> TrialRecord:
    metrics = trial.user_attrs.get("metrics", {})
    curve = dict(sorted(trial.intermediate_values.items()))
    value = trial.value if trial.state == TrialState.COMPLETE else (curve[max(curve)] if curve else None)
    spared, rule = trial.user_attrs.get("spared"), config.search.pruning
    ended = "trained to the end" + (f" as an audit: else pruned at epoch {spared}" if spared else "")
    default = {"COMPLETE": ended, "RUNNING": "running"}.get(trial.state.name, "")
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        params=draw.params(config, trial),
        value=value,
        metrics=metrics,
        steps=int(metrics.get("steps", 0)),
        curve=curve,
        why=trial.user_attrs.get("why", default),
        reason=trial.user_attrs.get("reason", "error") if trial.state == TrialState.FAIL else None,
        audited=rule is not None and is_audited(trial.number, config.seed, rule.audit),
        spared=spared,
    )
