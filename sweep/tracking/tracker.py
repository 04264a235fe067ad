"""MLflow as a projection of the study: a thread of the driver sends what trials have written to their own files.

Training never waits for the server. Each trial appends to `metrics.jsonl`; this thread sends the points that it has not
sent yet, with their original times, and stores its position in `mlflow.json` beside them. Sending a point again changes
nothing, so a kill or an unavailable server loses no point and doubles none.

What `mlflow.json` says is a belief. When a driver starts, after every error, and when it ends, one search compares it
with what the server has: runs that are missing there are created again, and a run without its newest points gets them
again. A trial that ends is compared point by point, whatever happened to the server in the meantime.

A driver that ends in an orderly way leaves no run RUNNING: runs that the next command resumes are SCHEDULED. The runs
of a killed driver stay RUNNING until then.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from data.atomic import write_file
from data.errors import UserError
from model.training.metrics_log import MetricsLog, MetricsReader, Point
from sweep.analysis.leaderboard import store_intervals
from sweep.analysis.predictions import interval_around
from sweep.compat import set_default_artifact_root
from sweep.config.files import dump
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.space import FOLD
from sweep.config.version import code_version
from sweep.search.sampling.objectives import pareto_front
from sweep.search.stopping import total_trials
from sweep.search.study import StudyStore, TrialRecord, best_first, has_started
from sweep.search.study_storage import sweep_id
from sweep.tracking import summary
from sweep.tracking.access import denial, tracking_uri
from sweep.tracking.dataset import Corpus
from sweep.tracking.note import link, note
from sweep.tracking.registry import publish
from sweep.tracking.runs import REFUSED, Runs, lacks, now
from sweep.tracking.views import charts_link, save_view, trials_link

if TYPE_CHECKING:
    from mlflow.entities import Run

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
MAX_WAIT = 15.0  # seconds between two attempts while the server is unavailable
Say = Callable[[str], object]


class RunState(TypedDict, total=False):
    """Content of `mlflow.json`: what is believed about a run. `started`, `finished` and `codes` hold in any case."""

    run_id: str
    experiment: str  # of the sweep's own run
    ended: bool  # the server has everything
    started: int  # milliseconds
    finished: int  # milliseconds
    codes: list[str]  # versions of the code that ran the trial
    offset: int  # bytes of `metrics.jsonl` that were sent
    highest: dict[str, int]  # newest step that was sent, by metric


def mlflow_run_id(folder: Path, number: int) -> str | None:
    """Return the MLflow run of a trial, if it has one yet."""
    return _read_state(trial_folder(folder, number)).get("run_id")


def parent_run_id(folder: Path) -> str | None:
    """Return the MLflow run of a sweep, if it has one yet."""
    return _read_state(folder).get("run_id")


def view_links(folder: Path) -> tuple[str, str] | None:
    """Return the addresses within MLflow's UI of a sweep's trials and of its charts; None before it has a view."""
    experiment = _read_state(folder).get("experiment")
    if experiment is None:
        return None
    key = sweep_id(folder)
    return trials_link(experiment, key), charts_link(experiment, key)


def is_sent(folder: Path) -> bool:
    """Return whether MLflow was sent everything about a sweep that has ended."""
    return _read_state(folder).get("ended", False)


class Tracker(threading.Thread):
    """Keeps MLflow up to date with the study until `finish` is called.

    Args:
        config: of the sweep.
        folder: of the sweep.
        corpus: that the runs are linked to.
        every: seconds between two rounds of sending.
        say: shows a line to the user when the server becomes unavailable, and when it is back.
    """

    def __init__(
        self, config: Config, folder: Path, corpus: Corpus, every: float = 1.0, say: Say = lambda _: None
    ) -> None:
        super().__init__(daemon=True, name="mlflow")
        self.config, self.folder, self.corpus, self.every, self.say = config, folder.absolute(), corpus, every, say
        self.uri = tracking_uri(folder)
        self.key = sweep_id(self.folder)
        self.ended = threading.Event()
        self.error: str | None = None
        self.complete = False
        self.study: StudyStore | None = None
        self._forget()

    def finish(self, timeout: float = 120.0) -> bool:
        """Send what is left; return False if the server did not take it all within `timeout` seconds."""
        self.ended.set()
        self.join(timeout)
        return self.complete

    def run(self) -> None:
        """Send what is new, round by round."""
        wait = self.every
        while True:
            last = self.ended.is_set()
            try:
                if self.runs is None or last:
                    self._connect()
                self._sync(last)
                self._set_error(None)
                wait = self.every
                if last:
                    self.complete = True
                    return
            except Exception as error:  # of any kind: training continues, and the next round tries again
                self._set_error(denial(error) or f"{type(error).__name__}: {error}".splitlines()[0])
                wait = min(wait * 2, MAX_WAIT)
                self._forget()
            if self.ended.is_set():
                time.sleep(min(wait, 1.0))
            else:
                self.ended.wait(wait)

    def _set_error(self, error: str | None) -> None:
        """Keep the current error, and tell the user when it appears or disappears."""
        before, self.error = self.error, error
        if error is not None and before is None:
            self.say(f"MLflow is unavailable; metrics are buffered and will be retried ({error})")
        elif error is None and before is not None:
            self.say("MLflow is available again and has all results")

    def _forget(self) -> None:
        """Forget everything about the server that is not on disk; `_connect` compares that with what the server has."""
        self.runs: Runs | None = None
        self.states: dict[int, RunState] = {}  # of trials
        self.readers: dict[int, MetricsReader] = {}  # of running trials
        self.status: dict[str, str] = {}  # that MLflow shows, by run
        self.paused: dict[str, dict[str, str]] = {}  # tags that say that a trial is paused, by run
        self.sweep_metrics: dict[str, float] = {}  # of the sweep's own run

    def _connect(self) -> None:
        """Find or create the runs of the sweep, and compare them with what is believed about them."""
        self._forget()
        artifacts = self.folder.parent / "mlartifacts" / self.config.name
        set_default_artifact_root(artifacts)
        runs = Runs(self.uri, self.key, self.corpus)
        runs.enter(parent_run_id(self.folder), self.config.name, artifacts)
        by_key = runs.find()
        if self.key in by_key:
            parent = by_key[self.key]
            self.parent, self.sweep_metrics = str(parent.info.run_id), dict(parent.data.metrics)
            runs.complete(parent, {})
        else:
            self.parent = runs.create(self.key, self.folder.name, {}, {}, now())
        runs.client.update_run(self.parent, status="RUNNING")
        runs.client.log_text(self.parent, dump(self.config), "config.yaml")
        save_view(runs, self.config, self.parent)
        _write_state(self.folder, {"run_id": self.parent, "experiment": runs.experiment, "ended": False})
        for trial in self._trials():
            self._compare(runs, trial, by_key.get(f"{self.key}/{trial.number}"))
        self.runs = runs

    def _trials(self) -> list[TrialRecord]:
        try:
            self.study = self.study or StudyStore.read(self.folder, self.config)
        except UserError:
            return []  # no trial has started yet
        return [trial for trial in self.study.trials() if has_started(self.folder, trial)]

    def _state(self, number: int) -> RunState:
        if number not in self.states:
            self.states[number] = _read_state(trial_folder(self.folder, number))
        return self.states[number]

    def _save_state(self, number: int) -> None:
        _write_state(trial_folder(self.folder, number), self.states[number])

    def _compare(self, runs: Runs, trial: TrialRecord, run: "Run | None") -> None:
        """Forget what is believed about a trial if its run contradicts it, so that everything is sent again."""
        state = self._state(trial.number)
        lasting: RunState = {}
        if "started" in state:
            lasting["started"] = state["started"]
        if "finished" in state:
            lasting["finished"] = state["finished"]
        if "codes" in state:
            lasting["codes"] = state["codes"]
        if run is None:
            self.states[trial.number] = lasting
            return
        run_id = str(run.info.run_id)
        self.status[run_id] = run.info.status
        if state.get("run_id") != run_id or lacks(run, state.get("highest", {})):
            self.states[trial.number] = {**lasting, "run_id": run_id}
        elif run.info.status != STATUS.get(trial.state):
            state["ended"] = False
        if run.data.tags.get(summary.ENDING[0]) == "PAUSED":
            self.paused[run_id] = {name: run.data.tags.get(name, "") for name in summary.PAUSING}
        elif not trial.has_ended and summary.ENDING[0] in run.data.tags:
            self._reopen(runs, trial.number)
        runs.complete(run, summary.params(self.config, trial))
        # A trial may be resumed by another version of the code.
        state = self._state(trial.number)
        if trial.state == "RUNNING" and state.get("codes", [])[-1:] != [code_version()]:
            state["codes"] = [*state.get("codes", []), code_version()]
            runs.client.set_tag(run_id, "sweep.code", ", ".join(state["codes"]))
            self._save_state(trial.number)
        if run.data.tags.get("mlflow.parentRunId") != self.parent:
            runs.client.set_tag(run_id, "mlflow.parentRunId", self.parent)

    def _sync(self, last: bool) -> None:
        """Send what is new about all trials; in the last round also what concerns the sweep as a whole."""
        from mlflow.exceptions import MlflowException

        trials, refusal = self._trials(), None
        for trial in trials:
            try:
                self._sync_trial(trial, last)
            except MlflowException as error:
                if error.error_code != REFUSED:
                    raise
                refusal = refusal or error  # the server refuses this trial's data and takes that of the others
                self.readers.pop(trial.number, None)
        if last:
            self._end_sweep(trials, all_sent=refusal is None)
        if refusal is not None:
            raise refusal

    def _end_sweep(self, trials: Sequence[TrialRecord], all_sent: bool) -> None:
        """Complete the sweep's own run: note, best trial and code; each summary metric once for so many trials."""
        assert self.runs is not None
        client, ended = self.runs.client, sum(trial.has_ended for trial in trials)
        run_ids = {trial.number: self._state(trial.number).get("run_id", "") for trial in trials}
        links = {number: link(self.runs.experiment, run_id) for number, run_id in run_ids.items() if run_id}
        views = trials_link(self.runs.experiment, self.key), charts_link(self.runs.experiment, self.key)
        tags = {"mlflow.note.content": note(self.config, self.folder, trials, links, views)}
        tags["sweep.code"] = ", ".join((self.study.codes() if self.study else []) or [code_version()])
        if front := pareto_front(self.config, trials):
            tags["sweep.pareto_front"] = ", ".join(str(trial.number) for trial in front)
        best = next(iter(best_first(self.config, trials)), None)
        if best is not None:
            tags |= {"sweep.best_trial": str(best.number), "sweep.best_run": run_ids[best.number]}
        metrics = summary.sweep_metrics(self.config, trials)
        changed = {name: value for name, value in metrics.items() if self.sweep_metrics.get(name) != value}
        self.runs.send(self.parent, [Point(name, ended, now(), value) for name, value in changed.items()], tags)
        finished = all_sent and ended >= total_trials(self.config, trials)
        # The best of several folds is only the easiest fold, so it is no model to publish.
        if finished and best is not None and FOLD not in self.config.search.space:
            publish(self.runs, self.config.name, self.folder, best, run_ids[best.number])
        if finished:
            client.set_terminated(self.parent, "FINISHED")
        else:  # until the command is rerun
            client.update_run(self.parent, status="SCHEDULED")
        _write_state(self.folder, {"run_id": self.parent, "experiment": self.runs.experiment, "ended": finished})

    def _sync_trial(self, trial: TrialRecord, last: bool) -> None:
        """Send what is new about a trial, and end its run if the trial has ended."""
        assert self.runs is not None
        number, state = trial.number, self._state(trial.number)
        if not trial.has_ended and "finished" in state:
            self._reopen(self.runs, number)
        if state.get("ended"):
            return
        if "run_id" not in state:
            self._create_run(self.runs, trial)
        if number not in self.readers:
            self.readers[number] = self._unsent(self.runs, number)
        self._send_points(self.runs, number, self.readers[number])
        if trial.has_ended:
            self._end_run(self.runs, trial)
            return
        run_id, is_paused = state["run_id"], trial.state == "PAUSED"
        status = "SCHEDULED" if last or is_paused else "RUNNING"
        if self.status.get(run_id) != status:
            self.runs.client.update_run(run_id, status=status)
            self.status[run_id] = status
        if is_paused and self.paused.get(run_id) != (tags := summary.pause_tags(trial)):
            self.runs.send(run_id, [], tags)
            self.paused[run_id] = tags
        elif not is_paused and run_id in self.paused:
            self.runs.delete_tags(run_id, reversed(summary.PAUSING))
            del self.paused[run_id]

    def _reopen(self, runs: Runs, number: int) -> None:
        """Continue the run of a trial that had failed and runs again: remove what said how it ended."""
        state = self._state(number)
        runs.delete_tags(state["run_id"], reversed(summary.ENDING))  # the first one last: until then, it is repeated
        self.status.pop(state["run_id"], None)
        state["ended"] = False
        state.pop("finished", None)
        self._save_state(number)

    def _create_run(self, runs: Runs, trial: TrialRecord) -> None:
        state, attempted = self._state(trial.number), MetricsLog(trial_folder(self.folder, trial.number)).time_range()
        state.setdefault("started", attempted[0] if attempted else now())
        state.setdefault("codes", [code_version()])
        tags = {"mlflow.parentRunId": self.parent, **summary.start_tags(self.config, trial, state["codes"])}
        params, name = summary.params(self.config, trial), f"trial-{trial.number:04d}"
        state["run_id"] = runs.create(f"{self.key}/{trial.number}", name, tags, params, state["started"])
        state["offset"] = 0
        self._save_state(trial.number)

    def _unsent(self, runs: Runs, number: int) -> MetricsReader:
        """Return a reader of a trial's metrics, positioned at the points that its run lacks."""
        state, folder = self._state(number), trial_folder(self.folder, number)
        reader = MetricsReader(folder)
        if "offset" in state and reader.skip(state["offset"]) and reader.last_steps() == state.get("highest", {}):
            return reader
        return MetricsReader(folder, runs.steps(state["run_id"]))  # the state is unknown, or of another file

    def _send_points(self, runs: Runs, number: int, reader: MetricsReader) -> None:
        state, points = self._state(number), reader.read()
        runs.send(state["run_id"], points)
        if points or state.get("offset") != reader.offset:
            state["offset"], state["highest"] = reader.offset, reader.last_steps()
            self._save_state(number)

    def _end_run(self, runs: Runs, trial: TrialRecord) -> None:
        """Complete and end the run of a trial that has ended."""
        number, state, folder = trial.number, self._state(trial.number), trial_folder(self.folder, trial.number)
        run_id, steps, points = state["run_id"], runs.steps(state["run_id"]), MetricsReader(folder).read()
        self._send_points(runs, number, MetricsReader(folder, steps))
        # The file of the trial has numbers for balanced classes; a trial that never began has no file.
        path = folder / "config.yaml"
        config = path.read_text(encoding="utf-8") if path.exists() else dump(self.config.for_trial(trial.params))
        tags = runs.log_artifacts(run_id, config, folder)
        store_intervals(self.config, self.folder, trial)
        finished = state.setdefault("finished", max((point.milliseconds for point in points), default=now()))
        step = max((point.step for point in points), default=0)
        objective = self.config.search.metric
        limits = None if trial.value is None else interval_around(self.folder, trial, objective, trial.value)
        metrics = summary.trial_metrics(self.config, trial, points, limits)
        new = [Point(name, step, finished, value) for name, value in metrics.items() if step not in steps.get(name, ())]
        runs.send(run_id, new, tags | summary.end_tags(trial, MetricsLog(folder).last_attempt()))
        runs.client.set_terminated(run_id, STATUS[trial.state], end_time=finished)
        state.setdefault("highest", {}).update(dict.fromkeys(metrics, step))
        state["ended"] = True
        self._save_state(number)
        self.readers.pop(number, None)


def server_has_all(config: Config, folder: Path) -> bool:
    """Return whether MLflow still has what it was sent of a sweep that has ended; True also if it cannot be asked now.

    Such a sweep sends nothing any more unless there is a reason to, which this function finds.
    """
    from mlflow.exceptions import MlflowException

    runs = Runs(tracking_uri(folder), sweep_id(folder))
    try:
        if not runs.enter(parent_run_id(folder), None, folder):
            return False
        by_key = runs.find()
    except MlflowException:
        return True
    for trial in StudyStore.read(folder, config).trials():
        state = _read_state(trial_folder(folder, trial.number))
        run = by_key.get(f"{runs.key}/{trial.number}")
        if run is None or run.info.run_id != state.get("run_id") or lacks(run, state.get("highest", {})):
            return False
        if run.info.status != STATUS.get(trial.state):
            return False
    return runs.key in by_key


def _read_state(folder: Path) -> RunState:
    """Return what is believed about a run; nothing, if the file does not exist or a power failure left it empty."""
    try:
        content: RunState = json.loads((folder / "mlflow.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_state(folder: Path, state: RunState) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "mlflow.json", json.dumps(state))
