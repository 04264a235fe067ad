"""MLflow as a projection of the ledger: a thread of the driver ships what trials wrote to their own files.

Training never waits for the server. Each trial appends to `metrics.jsonl`; this thread sends the points it has not sent
yet, with their original times, and remembers how far it got in `mlflow.json` beside them. Sending again changes
nothing, so a kill or a server that is away costs no point and doubles none.

What is remembered is a belief. When a driver starts, after every error, and when it ends, one search compares it with
what the server has: runs that are unknown there are made again, and a run without its newest points gets what it lacks.
A trial that ends is compared point by point, whatever happened to the server in the meantime.

A driver that ends in an orderly way leaves no run RUNNING: SCHEDULED are those that go on when the command is given
again. A driver that is killed cannot say so; its runs stay RUNNING until the command is given again.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.atomic import write_file
from data.errors import UserError
from model.training.metrics_log import MetricsLog, MetricsReader, Point
from sweep.config.files import dump
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.space import FOLD
from sweep.config.version import code_version
from sweep.search.study import StudyStore, TrialRecord, best_first, has_started
from sweep.search.study_storage import sweep_id
from sweep.tracking import summary
from sweep.tracking.access import denial, tracking_uri
from sweep.tracking.dataset import Corpus
from sweep.tracking.note import link, note
from sweep.tracking.registry import publish
from sweep.tracking.runs import REFUSED, Runs, lacks, now

if TYPE_CHECKING:
    from mlflow.entities import Run

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
LASTING = ("started", "finished", "codes")  # of a trial's mlflow.json: true whatever the server has
Say = Callable[[str], object]
LONGEST = 15.0  # seconds between two attempts at a server that is away


def mlflow_run_id(folder: Path, number: int) -> str | None:
    """The MLflow run of a trial, if it has one yet."""
    run_id: str | None = _read_state(trial_folder(folder, number)).get("run_id")
    return run_id


def parent_run_id(folder: Path) -> str | None:
    """The MLflow run of a sweep, if it has one yet."""
    run_id: str | None = _read_state(folder).get("run_id")
    return run_id


def is_shipped(folder: Path) -> bool:
    """Whether MLflow was sent all of a sweep that has ended."""
    return bool(_read_state(folder).get("ended"))


class Tracker(threading.Thread):
    """Keeps MLflow up to date with the ledger until `finish` is called."""

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
        self._doubt()

    def finish(self, timeout: float = 120.0) -> bool:
        """Ship what is left; False when the server did not take it all within `timeout` seconds."""
        self.ended.set()
        self.join(timeout)
        return self.complete

    def run(self) -> None:
        wait = self.every
        while True:
            last = self.ended.is_set()
            try:
                if self.runs is None or last:
                    self._connect()
                self._sync(last)
                self._tell(None)
                wait = self.every
                if last:
                    self.complete = True
                    return
            except Exception as error:  # whatever the server's trouble is, training goes on and this is tried again
                self._tell(denial(error) or f"{type(error).__name__}: {error}".splitlines()[0])
                wait = min(wait * 2, LONGEST)
                self._doubt()
            if self.ended.is_set():
                time.sleep(min(wait, 1.0))
            else:
                self.ended.wait(wait)

    def _tell(self, error: str | None) -> None:
        """Keep what is wrong, and say when something begins to be wrong, or ends to."""
        before, self.error = self.error, error
        if error is not None and before is None:
            self.say(f"MLflow lacks some results ({error}); training goes on, and they are sent when it takes them")
        elif error is None and before is not None:
            self.say("MLflow has all results again")

    def _doubt(self) -> None:
        """Believe nothing about the server that is not on disk; `_connect` compares that with what the server has."""
        self.runs: Runs | None = None
        self.states: dict[int, dict[str, Any]] = {}  # as in mlflow.json, by trial
        self.curves: dict[int, MetricsReader] = {}  # of trials that run
        self.status: dict[str, str] = {}  # that MLflow shows, by run
        self.summed: dict[str, float] = {}  # the metrics of the sweep's own run

    def _connect(self) -> None:
        self._doubt()
        store = self.folder.parent / "mlartifacts" / self.config.name
        runs = Runs(self.uri, self.key, self.corpus)
        runs.enter(_read_state(self.folder).get("run_id"), self.config.name, store)
        found = runs.look()
        if self.key in found:
            self.parent, self.summed = str(found[self.key].info.run_id), dict(found[self.key].data.metrics)
            runs.mend(found[self.key], {})
        else:
            self.parent = runs.make(self.key, self.folder.name, {}, {}, now())
        runs.client.update_run(self.parent, status="RUNNING")
        runs.client.log_text(self.parent, dump(self.config), "config.yaml")
        _write_state(self.folder, {"run_id": self.parent, "ended": False})
        for entry in self._entries():
            self._compare(runs, entry, found.get(f"{self.key}/{entry.number}"))
        self.runs = runs

    def _entries(self) -> list[TrialRecord]:
        try:
            self.study = self.study or StudyStore.read(self.folder, self.config)
        except UserError:
            return []  # no trial has started yet
        return [entry for entry in self.study.trials() if has_started(self.folder, entry)]

    def _state(self, number: int) -> dict[str, Any]:
        if number not in self.states:
            self.states[number] = _read_state(trial_folder(self.folder, number))
        return self.states[number]

    def _remember(self, number: int) -> None:
        _write_state(trial_folder(self.folder, number), self.states[number])

    def _compare(self, runs: Runs, entry: TrialRecord, run: "Run | None") -> None:
        """Forget what is believed of a trial if its run says otherwise, so that it is shipped again."""
        state = self._state(entry.number)
        kept = {name: value for name, value in state.items() if name in LASTING}
        if run is None:
            self.states[entry.number] = kept
            return
        run_id = str(run.info.run_id)
        self.status[run_id] = run.info.status
        if state.get("run_id") != run_id or lacks(run, state.get("highest", {})):
            self.states[entry.number] = {**kept, "run_id": run_id}
        elif run.info.status != STATUS.get(entry.state):
            state["ended"] = False
        runs.mend(run, summary.params(self.config, entry))
        self._note_code(runs, entry, run_id)
        if run.data.tags.get("mlflow.parentRunId") != self.parent:
            runs.client.set_tag(run_id, "mlflow.parentRunId", self.parent)

    def _note_code(self, runs: Runs, entry: TrialRecord, run_id: str) -> None:
        """A trial may go on under another version of the code than the one that it began with."""
        state = self._state(entry.number)
        if entry.state == "RUNNING" and state.get("codes", [])[-1:] != [code_version()]:
            state["codes"] = [*state.get("codes", []), code_version()]
            runs.client.set_tag(run_id, "sweep.code", ", ".join(state["codes"]))
            self._remember(entry.number)

    def _sync(self, last: bool) -> None:
        from mlflow.exceptions import MlflowException

        entries, refusal = self._entries(), None
        for entry in entries:
            try:
                self._sync_trial(entry, last)
            except MlflowException as error:
                if error.error_code != REFUSED:
                    raise
                refusal = refusal or error  # the server is there: this trial's trouble is not that of the others
                self.curves.pop(entry.number, None)
        if last:
            self._end_sweep(entries, refusal is None)
        if refusal is not None:
            raise refusal

    def _end_sweep(self, entries: list[TrialRecord], whole: bool) -> None:
        assert self.runs is not None
        client, ended = self.runs.client, sum(entry.state != "RUNNING" for entry in entries)
        finished = whole and ended >= self.config.search.trials
        self._sum_up(self.runs, entries, ended)
        chooses = finished and FOLD not in self.config.search.space  # the best of folds is the easiest one
        for best in best_first(self.config, entries)[:1] if chooses else []:
            publish(self.runs, self.config.name, self.folder, best, self._state(best.number)["run_id"])
        if finished:
            client.set_terminated(self.parent, "FINISHED")
        else:  # nobody works on it until the command is given again
            client.update_run(self.parent, status="SCHEDULED")
        _write_state(self.folder, {"run_id": self.parent, "ended": finished})

    def _sum_up(self, runs: Runs, entries: list[TrialRecord], ended: int) -> None:
        """The note, the best trial and the code, on the sweep's own run; each value once for so many trials."""
        own = {entry.number: str(self._state(entry.number).get("run_id", "")) for entry in entries}
        links = {number: link(runs.experiment, run_id) for number, run_id in own.items() if run_id}
        told = {"mlflow.note.content": note(self.config, self.folder, entries, links)}
        told["sweep.code"] = ", ".join((self.study.codes() if self.study else []) or [code_version()])
        for best in best_first(self.config, entries)[:1]:
            told |= {"sweep.best_trial": str(best.number), "sweep.best_run": own[best.number]}
        metrics = summary.sweep_metrics(self.config, entries)
        new = [Point(name, ended, now(), value) for name, value in metrics.items() if self.summed.get(name) != value]
        runs.send(self.parent, new, told)

    def _sync_trial(self, entry: TrialRecord, last: bool) -> None:
        assert self.runs is not None
        number, state = entry.number, self._state(entry.number)
        if state.get("ended"):
            return
        if "run_id" not in state:
            self._start(self.runs, entry)
        if number not in self.curves:
            self.curves[number] = self._curve(self.runs, number)
        self._ship(self.runs, number, self.curves[number])
        run_id = state["run_id"]
        if entry.state != "RUNNING":
            self._end(self.runs, entry)
            return
        status = "SCHEDULED" if last else "RUNNING"
        if self.status.get(run_id) != status:
            self.runs.client.update_run(run_id, status=status)
            self.status[run_id] = status

    def _start(self, runs: Runs, entry: TrialRecord) -> None:
        """Make the run of a trial that has none."""
        state, known = self._state(entry.number), MetricsLog(trial_folder(self.folder, entry.number)).time_range()
        state.setdefault("started", known[0] if known else now())
        state.setdefault("codes", [code_version()])
        tags = {"mlflow.parentRunId": self.parent, **summary.start_tags(self.config, entry, state["codes"])}
        params, name = summary.params(self.config, entry), f"trial-{entry.number:04d}"
        state["run_id"] = runs.make(f"{self.key}/{entry.number}", name, tags, params, state["started"])
        state["offset"] = 0
        self._remember(entry.number)

    def _curve(self, runs: Runs, number: int) -> MetricsReader:
        """The points of a trial that its run lacks."""
        state, folder = self._state(number), trial_folder(self.folder, number)
        curve = MetricsReader(folder)
        if "offset" in state and curve.skip(state["offset"]) and curve.last_steps() == state.get("highest", {}):
            return curve
        return MetricsReader(
            folder, runs.steps(state["run_id"])
        )  # the file does not tell, or is not the one that was sent

    def _ship(self, runs: Runs, number: int, curve: MetricsReader) -> None:
        state, points = self._state(number), curve.read()
        runs.send(state["run_id"], points)
        if points or state.get("offset") != curve.offset:
            state.update(offset=curve.offset, highest=curve.last_steps())
            self._remember(number)

    def _end(self, runs: Runs, entry: TrialRecord) -> None:
        """Complete the run of a trial that is over."""
        number, state, folder = entry.number, self._state(entry.number), trial_folder(self.folder, entry.number)
        known, points = runs.steps(state["run_id"]), MetricsReader(folder).read()
        self._ship(runs, number, MetricsReader(folder, known))
        own = folder / "config.yaml"  # what ran: with numbers for balanced classes; a trial that never began has none
        content = own.read_text(encoding="utf-8") if own.exists() else dump(self.config.for_trial(entry.params))
        tags = runs.artifacts(state["run_id"], content, folder)
        state.setdefault("finished", max((point.milliseconds for point in points), default=now()))
        step = max((point.step for point in points), default=0)
        metrics = summary.trial_metrics(self.config, entry, points)
        sums = [Point(name, step, state["finished"], value) for name, value in metrics.items()]
        new = [point for point in sums if step not in known.get(point.name, ())]
        runs.send(state["run_id"], new, tags | summary.end_tags(entry, MetricsLog(folder).last_attempt()))
        runs.client.set_terminated(state["run_id"], STATUS[entry.state], end_time=state["finished"])
        state.setdefault("highest", {}).update(dict.fromkeys(metrics, step))
        state["ended"] = True
        self._remember(number)
        self.curves.pop(number, None)


def still_has(config: Config, folder: Path) -> bool:
    """Whether MLflow still has what it was sent of a sweep that has ended; True also when it cannot be asked now.

    Such a sweep sends nothing any more unless there is a reason to, and this tells.
    """
    from mlflow.exceptions import MlflowException

    runs = Runs(tracking_uri(folder), sweep_id(folder))
    try:
        if not runs.enter(_read_state(folder).get("run_id"), None, folder):
            return False
        found = runs.look()
    except MlflowException:
        return True
    for entry in StudyStore.read(folder, config).trials():
        state = _read_state(trial_folder(folder, entry.number))
        run = found.get(f"{runs.key}/{entry.number}")
        if run is None or run.info.run_id != state.get("run_id") or lacks(run, state.get("highest", {})):
            return False
        if run.info.status != STATUS.get(entry.state):
            return False
    return runs.key in found


def _read_state(folder: Path) -> dict[str, Any]:
    """What is believed about a run; nothing, if the file is not there or a crash of the machine left it empty."""
    try:
        content = json.loads((folder / "mlflow.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "mlflow.json", json.dumps(state))
