"""`sweep run` from top to bottom: start, resume or extend a sweep, and return how it ended.

    lease, mirror ─► claim the folder ─► resolve and check ─► Ray ─► plan, feature cache, trials ─► Outcome
                                                              └──────── MLflow tracks ────────┘

`run` is the whole story; `SweepRunner` is the part that needs the lease. The study (`sweep.search`) decides what is
left to do, `sweep.execution` runs it, and a `Listener` receives the progress.
"""

import contextlib
import html
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from optuna.exceptions import StorageInternalError

from data.corpus.schema import SPLITS
from data.errors import reason
from data.loading.tasks import answer_problems
from model.checkpoints.base_files import base_models
from model.checkpoints.fingerprint import Bases, write_bases
from model.evaluation.ceiling import ceilings
from sweep.analysis.predictions import objective_error
from sweep.analysis.results import progress
from sweep.config.diff import claim_folder, continued
from sweep.config.files import write
from sweep.config.loader import flat
from sweep.config.paths import trial_folder
from sweep.config.resolve import ResolvedConfig, missing, resolve
from sweep.config.schema import Config
from sweep.config.space import Value, Values
from sweep.config.version import code_version
from sweep.durability.lease import LeaseHeldError, LeaseLostError, hold
from sweep.durability.mirror import Mirror, mirrored
from sweep.durability.retention import check_disk, disk_need, prune_checkpoints
from sweep.execution.cluster import ClusterError, ClusterLostError, RayStart, count_slots
from sweep.execution.job import TrialJob
from sweep.execution.orphans import end_orphans
from sweep.execution.signals import ExitCode, StopRequest
from sweep.execution.trial import open_shards, with_class_weights
from sweep.execution.tune import BackgroundWork, SweepAbortedError, run_trials
from sweep.execution.waiting import cleaning_up
from sweep.preflight.checks import building, resolve_inputs, skeleton
from sweep.preflight.earlier_sweeps import learn
from sweep.preflight.feature_cache import cache_folder, cached_folders, mark_used
from sweep.preflight.preparation import Preparation
from sweep.search.base_models import check_bases, study_bases
from sweep.search.candidates import first_trial
from sweep.search.corpus_notes import save_corpus_notes
from sweep.search.cost import budget_lines
from sweep.search.sampling.samplers import choose
from sweep.search.sampling.ties import reserved
from sweep.search.space_checks import check_requests, notes
from sweep.search.stopping import ended_early, total_trials
from sweep.search.study import StudyStore, TrialRecord, best_first
from sweep.search.study_storage import StudyBases
from sweep.tracking.access import check_access, tracking_uri
from sweep.tracking.dataset import Corpus
from sweep.tracking.tracker import Tracker, is_sent, server_has_all
from sweep.tracking.uri_check import check_uri

SEND_SECONDS = 120.0  # that MLflow has at the end; the next run sends what it did not take
COPY_SECONDS = 600.0  # that the mirror has at the end
LAST_SECONDS = 15.0  # that either has when the sweep was asked to stop, since the machine may be taken away


class Listener(Protocol):
    """Receives what a sweep has to tell while it runs; methods may be called from any thread."""

    def say(self, line: str) -> None:
        """Show a line of progress, which is plain text."""

    def warn(self, line: str) -> None:
        """Show a line that asks the user to do something."""

    def status(self, text: str) -> AbstractContextManager[object]:
        """Show what is being done while the block runs."""

    def checked(self, resolved: ResolvedConfig) -> None:
        """Show the model of a sweep whose inputs are good."""

    def running(self, config: Config, folder: Path) -> AbstractContextManager[object]:
        """Follow the trials while the block runs."""


class Silent:
    """A listener that shows nothing."""

    def say(self, line: str) -> None:
        """Ignore the line."""

    warn = say

    def status(self, text: str) -> AbstractContextManager[object]:
        """Show nothing."""
        return contextlib.nullcontext()

    def checked(self, resolved: ResolvedConfig) -> None:
        """Show nothing."""

    def running(self, config: Config, folder: Path) -> AbstractContextManager[object]:
        """Show nothing."""
        return contextlib.nullcontext()


@dataclass(frozen=True, repr=False)
class Outcome:
    """How a run of a sweep ended.

    `state` is "done" when every trial has ended and MLflow (and the mirror) have all results, "unfinished" when the
    same call resumes the sweep, and "failed" when something must be fixed first; `message` says what.
    """

    state: Literal["done", "unfinished", "failed"]
    exit_code: ExitCode  # of `sweep run`
    message: str  # one line
    config: Config  # of the sweep
    folder: Path
    trials: list[TrialRecord] = field(default_factory=list)  # empty where the run ended before it came to the trials

    @property
    def best(self) -> TrialRecord | None:
        """Return the best complete trial: its `number`, `params` and `value`, which is the objective."""
        return next(iter(best_first(self.config, self.trials)), None)

    @property
    def trials_left(self) -> int:
        """Return the number of trials that have not ended."""
        return trials_left(self.config, self.trials)

    def __repr__(self) -> str:
        best = self.best and f"trial {self.best.number}, {self.config.search.metric} {self.best.value:.3f}"
        return (
            f"Outcome({self.state!r}, exit_code={int(self.exit_code)}, folder={str(self.folder)!r}, "
            f"trials={len(self.trials)}, best={best or None}, message={self.message!r})"
        )

    def _repr_html_(self) -> str:
        """Return a table of the trials for a notebook."""
        rows = [("trial", "state", self.config.search.metric, "parameters")]
        rows += [
            (str(trial.number), trial.state, "" if trial.value is None else f"{trial.value:.3f}", str(trial.params))
            for trial in self.trials
        ]
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        table = "".join(f"<tr>{row}</tr>" for row in cells) if self.trials else ""
        return f"<p>{html.escape(self.message)}</p><table>{table}</table>"


def run(
    config: Config,
    folder: Path,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
    *,
    allow_other_base: bool = False,
    ray_start: RayStart | None = None,
) -> Outcome:
    """Start, resume or extend a sweep.

    Args:
        config: of the sweep.
        folder: of the sweep; created if it does not exist.
        listener: receives the progress; None: nothing is shown.
        stop: whether the sweep was asked to stop; None: signals ask it while this function runs.
        allow_other_base: resume or extend a sweep whose base models have changed since it was started.
        ray_start: of the cluster, which may have begun; the caller ends it. None: this function starts it.

    Raises:
        UserError: the settings, the corpus or a model cannot be used; a new sweep leaves nothing behind.
    """
    with contextlib.ExitStack() as stack:
        try:
            stop = stop or stack.enter_context(StopRequest())
            listener = listener or Silent()
            ray_start = ray_start or stack.enter_context(RayStart(listener.warn, early=False))
            return _run(config, folder, listener, stop, allow_other_base, ray_start)
        except SweepAbortedError as error:
            code = ExitCode.BAD_INPUT if error.reason == "bad data" else ExitCode.INFRASTRUCTURE
            message = f"{error}; the sweep was stopped, rerun the same command to resume ({folder})"
        except ClusterLostError as error:
            code, message = ExitCode.UNFINISHED, f"unfinished: {error} ({folder})"
        except (LeaseHeldError, LeaseLostError, ClusterError) as error:
            code, message = ExitCode.INFRASTRUCTURE, str(error)
        except OSError as error:
            code = ExitCode.INFRASTRUCTURE
            message = f"{folder}: {reason(error)}; fix this and rerun the same command"
        except StorageInternalError:
            code = ExitCode.INFRASTRUCTURE
            message = f"{folder}: the connection to the study's database was lost; rerun the same command to resume"
        except KeyboardInterrupt:
            code, message = ExitCode.UNFINISHED, f"stopped; rerun the same command to resume ({folder})"
    return Outcome("unfinished" if code == ExitCode.UNFINISHED else "failed", code, message, config, folder)


def _run(
    config: Config,
    folder: Path,
    listener: Listener,
    stop: StopRequest,
    allow_other_base: bool,
    ray_start: RayStart,
) -> Outcome:
    """Do the work of `run`, which handles what is raised."""
    server, resolved = tracking_uri(folder), None
    # A new sweep leaves nothing behind if its inputs are bad. The inputs of an existing one are only checked if
    # something is left to do.
    check_requests(config, folder)
    if not (folder / "config.yaml").exists():
        check_uri(server)
        ray_start.begin(config, config.search.trials)
        resolved = check_inputs(config, listener, allow_other_base)
        check_access(server, config.name, listener.warn)
        learn(config, folder, open_shards(resolved).fingerprint)  # raises an error where nothing can be learned
    with hold(folder, say=listener.say) as lease, _mirror(config, folder, listener, stop) as mirror:

        def check() -> None:
            lease.check()
            if mirror is not None:
                mirror.check()

        if (kept := continued(config, folder)) != config:  # the mirror may have brought the folder
            for key in sorted(key for key, value in flat(kept).items() if flat(config).get(key) != value):
                listener.say(f"{key}: {flat(kept)[key]}, as the existing trials were trained")
            config, resolved = kept, None
        claim_folder(config, folder)
        if orphans := end_orphans(folder):
            listener.say(f"ended {len(orphans)} processes that a killed run had left behind")
        runner, sent = SweepRunner(config, folder, listener, check, stop, ray_start, allow_other_base), True
        if left := runner.trials_to_run():
            ray_start.begin(config, left)
        if left or not is_sent(folder) or not server_has_all(config, folder):
            check_uri(server)
            resolved = resolved or check_inputs(config, listener, allow_other_base)
            for note in notes(config):
                listener.say(f"note: {note}")
            with listener.running(config, folder):
                sent = runner.run(resolved)
        trials, best = runner.study.trials(), runner.study.best()

    def outcome(state: Literal["done", "unfinished", "failed"], code: ExitCode, message: str) -> Outcome:
        return Outcome(state, code, message, config, folder, trials)

    if left := trials_left(config, trials):
        message = f"unfinished: {left} trial{'s are' if left > 1 else ' is'} left; rerun the same command to resume"
        return outcome("unfinished", ExitCode.UNFINISHED, message)
    if best is None:
        reasons = "; ".join(sorted({trial.why for trial in trials}))
        return outcome("failed", ExitCode.INFRASTRUCTURE, f"no trial was completed ({reasons})")
    if not sent:
        message = "unfinished: MLflow lacks some results; rerun the same command to send them"
        return outcome("unfinished", ExitCode.UNFINISHED, message)
    if mirror is not None and not mirror.complete:
        message = "unfinished: the mirror lacks some files; rerun the same command to copy them"
        return outcome("unfinished", ExitCode.UNFINISHED, message)
    ended = progress(config, trials)
    counts = {"complete": ended.complete, "pruned": ended.pruned, "failed": ended.failed}
    listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if len(trials) < config.search.trials:
        why = ended_early(config, trials)
        listed += f"; {why}" if why else ", which is all of search.space"
        listed += f" (search.trials is {config.search.trials})"
    return outcome("done", ExitCode.DONE, f"done: {listed}; the best is trial {best.number} ({folder})")


@contextlib.contextmanager
def _mirror(config: Config, folder: Path, listener: Listener, stop: StopRequest) -> Iterator[Mirror | None]:
    """Keep the copy of `storage.mirror` up to date while the block runs, and complete it at the end."""
    if config.storage.mirror is None:
        yield None
        return
    with mirrored(folder, config.storage.mirror, listener.say) as mirror:
        try:
            yield mirror
        finally:
            with cleaning_up("complete the mirror", listener.warn):
                mirror.finish(LAST_SECONDS if stop.requested.is_set() else COPY_SECONDS)
            if not mirror.complete:
                listener.warn(f"the mirror lacks some files ({mirror.error}); rerun the same command")


def check_inputs(config: Config, listener: Listener, allow_other_base: bool = False) -> ResolvedConfig:
    """Create built-in inputs that are missing, check corpus and models, and return the resolved configuration.

    Raises:
        UserError: see `resolve_inputs`.
    """
    check_bases(config)  # first of all, since it is cheap
    if new := missing(config):
        listener.say(f"creating {', '.join(new)}: once, then cached")
    with listener.status("checking corpus and models"):
        resolved = resolve_inputs(config, allow_other_base)
        listener.checked(resolved)
    return resolved


class SweepRunner:
    """Run what is left of a sweep, in the process that holds its lease.

    Args:
        config: of the sweep.
        folder: of the sweep.
        listener: receives the progress.
        check: raises LeaseLostError when another process has taken the sweep over.
        stop: whether the sweep was asked to stop.
        ray_start: of the cluster that runs the trials.
        allow_other_base: see `run`.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        listener: Listener,
        check: Callable[[], object],
        stop: StopRequest,
        ray_start: RayStart,
        allow_other_base: bool = False,
    ) -> None:
        self.config, self.folder = config, folder.absolute()
        self.listener, self.check, self.stop, self.ray_start = listener, check, stop, ray_start
        self.study = StudyStore.open(self.folder, config)
        self.study.error = lambda number, metric: objective_error(self.folder, number, metric)
        self.cache = cache_folder(config, self.folder)
        self.allow_other_base = allow_other_base
        self.bases: StudyBases = {}  # of this run

    def run(self, resolved: ResolvedConfig) -> bool:
        """Run the trials that are left while MLflow follows them, and return whether MLflow has all results.

        Raises:
            UserError: the sweep was started on another corpus or another base model.
        """
        say, shards = self.listener.say, open_shards(resolved)
        self.bases = study_bases(self.config)
        if note := self.study.bind(shards.fingerprint, code_version(), self.bases, self.allow_other_base):
            say(note)
        tasks, classes = list(self.config.tasks.active()), shards.merge.describe() if shards.merge else ""
        varied = {"data.fold", "data.codes"} & self.config.search.space.keys()  # trials have other items or labels
        found = [] if varied else ceilings(shards, tasks, SPLITS[1:])
        save_corpus_notes(self.folder, answer_problems(shards, tasks), classes, found)
        if (earlier := learn(self.config, self.folder, shards.fingerprint)) is not None:
            earlier.save(self.folder)
            self.study.earlier = earlier.sweeps
            for line in earlier.lines():
                say(line)
        for trial in self.study.failed_outside():
            say(f"trial {trial.number} failed for a cause outside its configuration ({trial.why}); it runs again")
        tracker = Tracker(self.config, self.folder, Corpus.of(shards), say=say)
        tracker.start()
        try:
            if self.trials_to_run():
                say("starting Ray")
                self.execute(resolved)
        finally:
            say("sending the last results to MLflow")
            sent, limit = False, LAST_SECONDS if self.stop.requested.is_set() else SEND_SECONDS
            with cleaning_up("send the last results to MLflow", self.listener.warn):
                sent = tracker.finish(limit)
            if not sent:
                why = tracker.error or f"not finished within {limit:g} s"
                self.listener.warn(f"MLflow lacks some results ({why}); rerun the same command to send them")
        return sent

    def execute(self, resolved: ResolvedConfig) -> None:
        """Run the trials that are left under Ray; return early when the sweep is asked to stop.

        Raises:
            SweepAbortedError: the same failure would hit every trial.
            ClusterError: there is no cluster to run on, or it is gone.
            UserError: no node can hold a trial, no trial fits into memory, or the disk cannot hold the checkpoints.
        """
        import ray

        say, storage = self.listener.say, self.folder / "ray"
        shutil.rmtree(storage, ignore_errors=True)
        with self.ray_start.connected(self.folder) as check_cluster:
            self.stop.install()
            alive = BackgroundWork(ray.nodes, "nodes", check_cluster).result()
            nodes = [node["Resources"] for node in alive if node["Alive"]]
            left = self.trials_to_run()
            slots = count_slots(resolved, nodes, left)
            say(check_disk(self.folder, disk_need(resolved, count_trained(resolved), slots)))

            def ready() -> None:
                # Only now: what would keep trials from training, as a model that is missing, has raised an error.
                self.study.retry()
                say(f"{slots} trial{'s' if slots > 1 else ''} at a time; the first starts once its workers are up")
                say(f"sampler: {choose(self.config)}")
                if kept := reserved(self.config):
                    say(f"further seeds: up to {kept} of {self.config.search.trials} trials, of tied configurations")
                for line in budget_lines(self.config, self.study.trials()):
                    say(f"budget: {line} spent")

            preparation = Preparation(self.study, resolved, self.cache, nodes, slots, left, say, ready)
            run_trials(
                self.study,
                resolved,
                slots,
                storage,
                self.ray_start.workers,
                prepare=preparation.run,
                make_job=lambda number, values: self.make_job(resolved, number, values, preparation.decide),
                check=self.check,
                ended=lambda: prune_checkpoints(self.study, self.folder),
                stop=self.stop,
                check_cluster=check_cluster,
                say=say,
            )
            if not trials_left(self.config, self.study.trials()):
                preparation.save_actual_time()
        shutil.rmtree(storage, ignore_errors=True)

    def trials_to_run(self) -> int:
        """Return the number of trials that have not ended, or have failed for a cause outside their configuration."""
        return trials_left(self.config, self.study.trials()) + len(self.study.failed_outside())

    def make_job(
        self,
        resolved: ResolvedConfig,
        number: int,
        values: dict[str, Value],
        planned: Callable[[Config, Values], Config] = lambda config, values: config,
    ) -> TrialJob:
        """Write the configuration of a trial into its folder, and return what its workers receive.

        Args:
            resolved: configuration of the sweep.
            number: of the trial.
            values: of the trial, by dotted key.
            planned: returns the configuration with what its dry run decides.

        Raises:
            UserError: the values do not go together.
        """
        folder = trial_folder(self.folder, number)
        folder.mkdir(parents=True, exist_ok=True)
        config = planned(self.config.for_trial(values), values)
        bases = self._bases(config)
        if bases:
            self.study.start(number, bases)
        trial = resolve(config)
        shards = open_shards(trial)  # the trial may be on another fold than the sweep
        write(with_class_weights(config, shards), folder / "config.yaml")
        trial = with_class_weights(trial, shards)
        with building:
            cached = cached_folders(trial, self.cache)
        mark_used(cached)
        features, logits = tuple(map(str, cached.features)), cached.teacher_logits
        return TrialJob(
            str(folder),
            trial.model_dump_json(),
            choose_reader(resolved),
            features,
            None if logits is None else str(logits),
            write_bases(bases),
            self.allow_other_base,
        )

    def _bases(self, config: Config) -> Bases:
        """Return the base models of a trial, as they were when this run began."""
        settings = flat(config)
        return {
            setting: self.bases[setting][settings[setting]]
            for setting, *_ in base_models(config.model)
            if settings[setting] in self.bases.get(setting, {})
        }


def trials_left(config: Config, trials: Sequence[TrialRecord]) -> int:
    """Return the number of trials that have not ended, or not started."""
    ended = sum(trial.has_ended for trial in trials)
    return max(0, total_trials(config, trials) - ended)


def count_trained(config: ResolvedConfig) -> int:
    """Return the number of parameters that train in a sweep's first trial."""
    model = skeleton(first_trial(config))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def choose_reader(config: ResolvedConfig) -> Literal["local", "ray"]:
    """Return the source of batches that `data.reader` stands for: "local" or "ray"."""
    if config.data.reader != "auto":
        return config.data.reader
    return "local" if Path(config.data.shards).is_dir() else "ray"
