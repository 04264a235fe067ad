"""The study: a persistent Optuna study that is the single source of truth about the trials of a sweep.

Ray Tune executes trials and MLflow shows them; parameters, reports and decisions are stored here and survive any kill.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from data.errors import UserError
from model.checkpoints.fingerprint import ALLOW, BaseIdentity
from model.training.progress import Metrics, best_epoch
from sweep.compat import writable_trial
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.space import Value
from sweep.search import pruning, retries, study_storage
from sweep.search.cost import COSTS, horizon, spent_budget
from sweep.search.sampling import draw as sampler
from sweep.search.sampling import ties
from sweep.search.sampling.advice import read_earlier
from sweep.search.sampling.history import params
from sweep.search.stopping import gain_below_noise, stopped_by_noise
from sweep.search.study_storage import StudyBases, open_study, read_study

State = Literal["RUNNING", "PAUSED", "COMPLETE", "PRUNED", "FAIL"]
Reason = Literal["non-finite", "out of memory", "bad data", "workers lost", "error"]
STOPPED = "stopped"  # user attribute of a study: after which trial the search stopped by itself, and why


@dataclass(frozen=True)
class TrialRecord:
    """What the study knows about a trial."""

    number: int
    state: State
    params: dict[str, Value]
    value: float | None  # objective at the last or the best reported epoch, see train.keep
    metrics: Metrics  # of that epoch; `COSTS` are those of the last one
    steps: int  # optimizer steps done
    curve: dict[int, float]  # objective by epoch
    why: str  # how the trial ended, for people
    reason: Reason | None = None  # kind of failure
    outside: bool = False  # whether it failed for a cause outside its configuration, and runs again
    audited: bool = False  # exempt from pruning
    exempted_at: int | None = None  # epoch at which an audited trial would have been pruned
    bases: Mapping[str, BaseIdentity] = field(default_factory=dict)  # its base models; none in earlier versions
    clock: float = 0.0  # seconds that the sweep had run when the trial reported last; only with search.budget.hours
    stopped: str = ""  # why no trial was drawn after this one, if the search stopped by itself
    epoch: int = 0  # whose value, metrics and weights are the trial's result; 0: none was reported
    compared: Mapping[int, float] = field(default_factory=dict)  # what is compared by rung, if not the objective
    errors: Mapping[int, float] = field(default_factory=dict)  # standard errors of what is compared by rung
    repeats: int | None = None  # number of the trial whose configuration this one trains with a fresh seed
    error: float = 0.0  # standard error of its value, by session; only with search.tie_share
    share: float | None = None  # of the training groups, that its last epoch was on; only with search.fidelity: data

    @property
    def has_ended(self) -> bool:
        """Return whether the trial is in a final state."""
        return self.state not in ("RUNNING", "PAUSED")


class NextTrial(NamedTuple):
    """A trial to start: its number, and the values of its axes by dotted key."""

    number: int
    params: dict[str, Value]


class StudyStore:
    """The trials of a sweep. One process writes (the driver, which holds the folder's lease); any may read.

    Attributes:
        fits: returns whether a new trial with some values may start; the plan of `sweep.preflight.dry_run` sets it.
        error: returns the standard error of a metric in a trial's last evaluation, 0 where it is unknown.
    """

    def __init__(self, folder: Path, config: Config, study: optuna.Study) -> None:
        self.folder = folder
        self.config = config
        self.study = study
        self.fits: sampler.Fits = lambda values: True
        self.error: Callable[[int, str], float] = lambda number, metric: 0.0
        earlier = read_earlier(folder) if config.search.learn_from else None
        self.earlier = earlier.sweeps if earlier else []
        self._clock: tuple[float, float] | None = None  # when this run asked first, and seconds of the runs before it
        self._exhausted = False  # whether every combination of a finite space has a trial
        self._ended: dict[int, TrialRecord] = {}  # records that do not change any more, by Optuna's number

    @classmethod
    def open(cls, folder: Path, config: Config) -> "StudyStore":
        """Open or create the study for writing; only the holder of the folder's lease may do this.

        Raises:
            UserError: the database of `storage.ledger` cannot be used.
        """
        return cls(folder, config, open_study(folder, config))

    @classmethod
    def read(cls, folder: Path, config: Config) -> "StudyStore":
        """Open an existing study for reading, also while a driver writes it.

        Raises:
            UserError: there is none, or its database cannot be used.
        """
        return cls(folder, config, read_study(folder, config))

    @classmethod
    def of(cls, folder: Path) -> "StudyStore":
        """Open the study of the sweep in a folder for reading, see `read`."""
        return cls.read(folder, load(str(folder / "config.yaml")))

    def ask(self, busy: Sequence[int], target: int, ahead: bool = False) -> NextTrial | None:
        """Return the next trial to run: an unfinished one that nothing runs, a paused one that continues, or a new one.

        The first one in this order. A new trial is written with all its values in one operation: after a kill it exists
        completely or not at all; so is the decision that a paused trial continues. Once further seeds are due, it
        trains a tied configuration again, see `sweep.search.sampling.ties`. What is left of a finite space and does not
        fit into memory is written as failed trials, which nothing runs. When nothing is left to start and nothing runs,
        trials that are still paused are pruned.

        Args:
            busy: numbers of the trials that run now.
            target: total number of trials.
            ahead: whether trials drawn before it wait, so that no values may be drawn that depend on results.

        Returns:
            The trial; None when there is nothing left to start. While trials are paused and others run, there may be
            something later, see `waits`.

        Raises:
            UserError: none of many draws fits into memory.
        """
        self._start_clock()
        trials, search = self.runs(), self.config.search
        for number, trial in enumerate(trials):
            if trial.state == TrialState.RUNNING and number not in busy and not pruning.is_paused(trial):
                return NextTrial(number, params(self.config, trial))
        rule = search.rule if search.rule is not None and search.rule.kind == "promote" else None
        spent = spent_budget(self.config, self.trials())
        has_ended = spent is not None or self._stops()
        promoted = pruning.promotable(trials, self.config, rule) if rule and not has_ended else None
        if promoted is not None:
            return self._promote(promoted, trials[promoted].user_attrs[pruning.PAUSED])
        is_over = has_ended or self._exhausted
        while spent is None and sum(trial.state != TrialState.WAITING for trial in trials) < target:
            again = ties.next_repeat(self.config, self.trials(), is_over)
            if ahead and (
                ties.are_due(self.config, self.trials(), is_over)
                or sampler.depends_on_results(self.config, trials, self.earlier)
            ):
                return None
            finishes = rule is not None and pruning.to_finish(trials, self.config, rule) is not None
            if finishes if again else is_over:
                break
            drawn: FrozenTrial | None
            if again is not None:
                drawn = ties.repeat(trials[again[0]], *again)
            else:
                drawn = sampler.draw(self.config, list(map(pruning.as_history, trials)), self.fits, self.earlier)
            if drawn is None:
                is_over = self._exhausted = True
                continue
            self.study.add_trial(drawn)
            if drawn.state == TrialState.RUNNING:
                return NextTrial(len(trials), params(self.config, self._frozen(len(trials))))
            trials = self.runs()
        if rule and (best := pruning.to_finish(trials, self.config, rule)) is not None:
            return self._promote(best, pruning.TO_THE_END)
        if not busy:
            self._prune_paused()
        return None

    def _stops(self) -> bool:
        """Return whether the search stops by itself because of the noise, and store the decision."""
        search, trials = self.config.search, self.trials()
        if stopped_by_noise(self.config, trials) is not None:
            return True
        if not search.stop_when or (why := gain_below_noise(self.config, trials)) is None:
            return False
        after = max(trial.number for trial in trials if trial.repeats is None)
        self.study.set_user_attr(STOPPED, {"after": after, "why": why})
        return True

    def waits(self, busy: Sequence[int]) -> bool:
        """Return whether a paused trial may continue once one of those that run has reported."""
        return bool(busy) and any(map(pruning.is_paused, self.runs()))

    def _promote(self, number: int, beyond: int) -> NextTrial:
        """Store that a paused trial continues, without a pause until after an epoch; return it."""
        frozen = self._frozen(number)
        writable_trial(self.study, frozen).set_user_attr(pruning.PASSED, beyond)
        return NextTrial(number, params(self.config, frozen))

    def _prune_paused(self) -> None:
        """End the trials that are paused for good. Each ends in one operation, so a kill leaves it paused or pruned."""
        for trial, record in zip(self.runs(), self.trials(), strict=False):
            if record.state == "PAUSED":
                writable_trial(self.study, trial).set_user_attr("why", record.why.replace("paused", "pruned", 1))
                self.study.tell(trial.number, state=TrialState.PRUNED)

    def _start_clock(self) -> tuple[float, float]:
        """Return when this run of the sweep began, and the seconds of the runs before it."""
        if self._clock is None:
            self._clock = time.monotonic(), max((trial.clock for trial in self.trials()), default=0.0)
        return self._clock

    def running(self) -> list[int]:
        """Return the numbers of the trials that were started, have not ended and are not paused."""
        return [trial.number for trial in self.trials() if trial.state == "RUNNING"]

    def runs(self) -> list[FrozenTrial]:
        """Return the latest run of each trial as Optuna has it; the index is the trial's number."""
        return retries.latest(self.study.get_trials(deepcopy=False))

    def failed_outside(self) -> list[TrialRecord]:
        """Return the trials that failed for a cause outside their configuration, which `retry` runs again."""
        return [trial for trial in self.trials() if trial.outside]

    def retry(self) -> list[TrialRecord]:
        """Let trials that failed for a cause outside their configuration run again, under their numbers.

        Each is changed in one operation: after a kill it has failed, or it runs again.

        Returns:
            The trials as they were.
        """
        failed, runs = self.failed_outside(), self.runs()
        for trial in failed:
            self.study.add_trial(retries.next_run(runs[trial.number], trial.number))
        return failed

    def excuse(self, numbers: Sequence[int]) -> None:
        """Store that trials failed as all others did, so that the cause is outside their configurations."""
        runs = self.runs()
        excused = {*self._common_faults(), *(runs[number].number for number in numbers)}
        self.study.set_user_attr(retries.COMMON_FAULTS, sorted(excused))
        self._ended.clear()

    def _common_faults(self) -> list[int]:
        return list(self.study.user_attrs.get(retries.COMMON_FAULTS, []))

    def points_left(self) -> list[dict[str, Value]]:
        """Return the points of the search that no trial has taken yet."""
        return sampler.points_left(self.config, self.runs())

    def report(self, number: int, epoch: int, metrics: Metrics) -> bool:
        """Store an epoch of a running trial and apply the pruning rule.

        The first report of an epoch counts: a resumed trial repeats epochs, and they change nothing.

        Returns:
            Whether the trial has ended or pauses; if it is pruned or pauses here, that is already stored.
        """
        frozen = self._frozen(number)
        if frozen.state != TrialState.RUNNING:
            return True
        search, reported = self.config.search, frozen.intermediate_values
        trial, value = writable_trial(self.study, frozen), float(metrics[search.metric])
        is_rung = epoch in search.rungs(self.config.train.epochs)
        compared = frozen.user_attrs.get(pruning.COMPARED, {})
        if is_rung and search.compared != search.metric and str(epoch) not in compared:
            trial.set_user_attr(pruning.COMPARED, compared | {str(epoch): float(metrics[search.compared])})
        if epoch in reported:
            value = reported[epoch]
        else:
            keeps = keeps_best(self.config, self._params(frozen))
            if keeps and epoch == best_epoch(reported | {epoch: value}, search.direction == "maximize"):
                trial.set_user_attr("kept", {"epoch": epoch, "metrics": metrics})  # before the value that refers to it
            if epoch > max(reported, default=0):  # a repeated report that was lost before is not the latest one
                trial.set_user_attr("metrics", metrics)
            if search.budget is not None and search.budget.hours is not None:
                since, before = self._start_clock()
                trial.set_user_attr("clock", before + time.monotonic() - since)
            trial.report(value, epoch)
        rule, last, attributes = search.rule, horizon(self.config, self._params(frozen)), frozen.user_attrs
        # A decision is stored in one operation and never taken again, neither for a repeated report nor for a trial
        # that was exempted at an earlier rung.
        decided = epoch <= attributes.get(pruning.PASSED, 0) or pruning.EXEMPTED in attributes or ties.is_repeat(frozen)
        if rule is None or decided or epoch >= last or not is_rung:
            return False
        errors = attributes.get(pruning.ERRORS, {})
        if rule.noise and str(epoch) not in errors:
            trial.set_user_attr(pruning.ERRORS, errors | {str(epoch): self.error(number, search.compared)})
        rung = pruning.Rung.of(number, self.runs(), epoch, self.config)
        if pruning.continues(number, rung, rule):
            trial.set_user_attr(pruning.PASSED, epoch)
            return False
        if pruning.is_audited(number, self.config.seed, rule.audit):
            trial.set_user_attr(pruning.EXEMPTED, epoch)
            return False
        if rule.kind == "promote":
            trial.set_user_attr(pruning.PAUSED, epoch)
            return True
        trial.set_user_attr("why", f"pruned at epoch {epoch}: {rung.describe(number, search.compared)}")
        self.study.tell(frozen.number, state=TrialState.PRUNED)
        return True

    def bind(
        self,
        fingerprint: str,
        code: str | None = None,
        bases: StudyBases | None = None,
        allow_other_base: bool = False,
    ) -> str | None:
        """Bind the sweep to one corpus and to its base models, and store the version of the code.

        Args:
            fingerprint: of the corpus.
            code: see `sweep.config.version.code_version`.
            bases: the models that trials start from. A sweep of an earlier version that has none gains them.
            allow_other_base: accept other ones than before.

        Returns:
            A note for the user where the code or a model has changed since the last run.

        Raises:
            UserError: the sweep was started on another corpus or another base model.
        """
        notes = list[str]()
        started_on = self.fingerprint()
        if started_on is None:
            self.study.set_user_attr("fingerprint", fingerprint)
        elif started_on != fingerprint:
            raise UserError(
                f"{self.folder}: started on another corpus (fingerprint: {started_on} → {fingerprint}); "
                "restore the previous data.shards, or use --out for a new folder"
            )
        if bases and (changes := self.other_bases(bases)):
            if not allow_other_base:
                raise UserError(self.other_bases_message(changes))
            notes.append(f"base models: {changes}; results differ from those of earlier trials")
        if bases:
            study_storage.store_bases(self.study, bases)
        codes = self.codes()
        if code is not None and codes[-1:] != [code]:
            self.study.set_user_attr("codes", [*codes, code])
            if codes:
                notes.append(f"code: {codes[-1]} → {code}; results may differ from those of earlier trials")
        return "\n".join(notes) or None

    def bases(self) -> dict[str, dict[str, BaseIdentity]]:
        """Return the models that trials start from, by setting and value; none in sweeps of earlier versions."""
        return study_storage.stored_bases(self.study)

    def other_bases(self, bases: StudyBases) -> str:
        """Return which models are not those that the sweep was started with, in words; empty if all are."""
        return study_storage.changed_bases(self.study, bases)

    def other_bases_message(self, changes: str) -> str:
        """Return the error for `changes`, as `other_bases` returns them."""
        return (
            f"{self.folder}: started with another base model ({changes}); restore its files, use --out for a new "
            f"folder, or accept other results with {ALLOW}"
        )

    def start(self, number: int, bases: Mapping[str, BaseIdentity]) -> None:
        """Store the base models with which a trial starts or resumes, by setting."""
        stored, frozen = {setting: base.model_dump() for setting, base in bases.items()}, self._frozen(number)
        if frozen.user_attrs.get("bases", {}) != stored:
            writable_trial(self.study, frozen).set_user_attr("bases", stored)

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the corpus that the sweep is bound to."""
        fingerprint: str | None = self.study.user_attrs.get("fingerprint")
        return fingerprint

    def codes(self) -> list[str]:
        """Return the versions of the code that worked on this sweep, in order."""
        return list(self.study.user_attrs.get("codes", []))

    def complete(self, number: int) -> None:
        """Store that a trial has trained to its end; its value is that of the epoch that it keeps."""
        frozen = self._frozen(number)
        is_best, reported = keeps_best(self.config, self._params(frozen)), frozen.intermediate_values
        maximize = self.config.search.direction == "maximize"
        value = reported[best_epoch(reported, maximize) if is_best else max(reported)]
        if math.isfinite(value):
            if self.config.search.tie_share:
                writable_trial(self.study, frozen).set_user_attr(
                    ties.ERROR, self.error(number, self.config.search.metric)
                )
            self.study.tell(frozen.number, value)
        else:
            epochs = "every epoch" if is_best else "the last epoch"
            self.fail(number, f"the {self.config.search.metric} of {epochs} is not finite", reason="non-finite")

    def fail(self, number: int, why: str, reason: Reason = "error", outside: bool | None = None) -> None:
        """Store that a trial cannot be finished; a trial that has ended stays as it is.

        Args:
            number: of the trial.
            why: message for people.
            reason: kind of failure; the search avoids parameters that ran out of memory.
            outside: whether the cause is outside the trial's configuration, so that the next `sweep run` runs it
                again; None: the reason decides.
        """
        frozen = self._frozen(number)
        if frozen.state == TrialState.RUNNING:
            trial = writable_trial(self.study, frozen)
            trial.set_user_attr("why", why)
            trial.set_user_attr("reason", reason)
            trial.set_user_attr("outside", reason in retries.OUTSIDE if outside is None else outside)
            self.study.tell(frozen.number, state=TrialState.FAIL)

    def trials(self) -> list[TrialRecord]:
        """Return every trial that was started, by number."""
        records, common_faults, runs = [], self._common_faults(), self.runs()
        rungs = pruning.Rung.of_paused(runs, self.config)
        for number, trial in enumerate(runs):
            if trial.state == TrialState.WAITING:
                continue
            record = self._ended.get(trial.number) or self._record(number, trial, common_faults, rungs.get(number))
            if trial.state.is_finished():
                self._ended[trial.number] = record
            records.append(record)
        drawn = [index for index, record in enumerate(records) if record.repeats is None]
        if (stopped := self.study.user_attrs.get(STOPPED)) and drawn and records[drawn[-1]].number == stopped["after"]:
            records[drawn[-1]] = replace(records[drawn[-1]], stopped=stopped["why"])
        return records

    def best(self) -> TrialRecord | None:
        """Return the complete trial with the best value; on a tie the earlier one."""
        return next(iter(best_first(self.config, self.trials())), None)

    def trial_config(self, trial: TrialRecord) -> Config:
        """Return the configuration that reproduces a trial by itself."""
        return self.config.for_trial(trial.params)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.runs()[number]

    def _params(self, trial: FrozenTrial) -> dict[str, Value]:
        return params(self.config, trial)

    def _record(
        self, number: int, trial: FrozenTrial, common_faults: Sequence[int], rung: pruning.Rung | None
    ) -> TrialRecord:
        """Return a trial, which may wait at a rung, as a record; its user attributes are the format on disk."""
        metrics: Metrics = trial.user_attrs.get("metrics", {})
        curve, kept = dict(sorted(trial.intermediate_values.items())), trial.user_attrs.get("kept", {})
        if kept:
            metrics = metrics | {name: value for name, value in kept["metrics"].items() if name not in COSTS}
        epoch = kept.get("epoch", max(curve, default=0))
        value = trial.value if trial.state == TrialState.COMPLETE else curve.get(epoch)
        search, epochs = self.config.search, self.config.train.epochs
        exempted_at, rule = trial.user_attrs.get(pruning.EXEMPTED), search.rule
        exempt = f" (exempt from pruning; would have been pruned at epoch {exempted_at})" if exempted_at else ""
        default = {"COMPLETE": f"trained to the end{exempt}", "RUNNING": "running"}.get(trial.state.name, "")
        if rung is not None:
            default = f"paused at epoch {trial.user_attrs[pruning.PAUSED]}: {rung.describe(number, search.compared)}"
        return TrialRecord(
            number=number,
            state="PAUSED" if rung is not None else trial.state.name,
            params=self._params(trial),
            value=value,
            metrics=metrics,
            clock=float(trial.user_attrs.get("clock", 0.0)),
            epoch=epoch,
            steps=int(metrics.get("steps", 0)),
            curve=curve,
            why=trial.user_attrs.get("why", default),
            reason=trial.user_attrs.get("reason", "error") if trial.state == TrialState.FAIL else None,
            outside=retries.failed_outside(trial, common_faults),
            audited=rule is not None and pruning.is_audited(number, self.config.seed, rule.audit),
            exempted_at=exempted_at,
            bases=study_storage.identities(trial.user_attrs.get("bases", {})),
            repeats=trial.user_attrs.get(ties.REPEATS, [None])[0],
            share=None if search.fidelity == "epochs" else search.share_at(max(curve, default=1), epochs),
            error=float(trial.user_attrs.get(ties.ERROR, 0.0)),
            compared={int(at): value for at, value in trial.user_attrs.get(pruning.COMPARED, {}).items()},
            errors={int(at): error for at, error in trial.user_attrs.get(pruning.ERRORS, {}).items()},
        )


def best_first(config: Config, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the complete trials, best first; on a tie the earlier one.

    Of a configuration that was trained with several seeds, only the first trial is in the list; it is ranked by the
    mean of all of them.
    """
    first = {trial.number: trial for trial in trials if trial.repeats is None and trial.state == "COMPLETE"}
    return [first[trained.number] for trained in ties.by_mean(config, trials) if trained.number in first]


def keeps_best(config: Config, params: Mapping[str, Value]) -> bool:
    """Return whether a trial with these values keeps its best epoch, not its last one."""
    return params.get("train.keep", config.train.keep) == "best"


def has_started(folder: Path, trial: TrialRecord) -> bool:
    """Return whether readers should show a trial: its folder is made right after it was stored."""
    return trial.has_ended or (trial_folder(folder, trial.number) / "config.yaml").exists()
