"""MLflow as a projection of the ledger: a thread of the driver ships what trials wrote to their own files.

Training never waits for the server. Each trial appends to `metrics.jsonl`; this thread sends the lines it has not sent
yet, with their original times, and remembers how far it got in `mlflow.json` beside them. Sending again changes
nothing, so a kill or a server that is away costs no point and doubles none.
"""

import io
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sweep.config import Config, dump
from sweep.ledger import FILE, Entry, Ledger, is_drawn, trial_config, trial_folder
from sweep.results import leaderboard_markdown, read_predictions

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
CHUNK = 1000  # metrics a request may hold


def tracking_uri(folder: Path) -> str:
    """$MLFLOW_TRACKING_URI, or SQLite beside the sweep's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute().parent / 'mlflow.db'}"


def ui_command(folder: Path, program: str = "mlflow") -> str:
    """What a person types to look at the runs."""
    uri = tracking_uri(folder)
    if not uri.startswith("sqlite:///"):
        place = urlsplit(uri)  # without user and password: they are nobody's to print
        return f"open {place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}"
    database = Path(uri.removeprefix("sqlite:///"))
    shown = database.relative_to(Path.cwd()) if database.is_relative_to(Path.cwd()) else database
    return f"{program} server --backend-store-uri sqlite:///{shown} --host 127.0.0.1 --port 5000"


def mlflow_run_id(folder: Path, number: int) -> str | None:
    """The MLflow run of a trial, if it has one yet."""
    run_id: str | None = _read_state(trial_folder(folder, number)).get("run_id")
    return run_id


def is_shipped(folder: Path) -> bool:
    """Whether MLflow has all of a sweep that has ended."""
    return bool(_read_state(folder).get("ended"))


class Tracker(threading.Thread):
    """Keeps MLflow up to date with the ledger until `finish` is called."""

    def __init__(self, config: Config, folder: Path, data: dict[str, str], every: float = 1.0) -> None:
        super().__init__(daemon=True, name="mlflow")
        self.config, self.folder, self.data, self.every = config, folder.absolute(), data, every
        self.uri = tracking_uri(folder)
        self.key = _sweep_key(self.folder)
        self.ended = threading.Event()
        self.error: str | None = None
        self.complete = False
        self.ledger: Ledger | None = None
        self.known: dict[str, str] = {}  # status that MLflow shows, by run

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
                self._connect()
                self._sync(last)
                self.error, wait = None, self.every
                if last:
                    self.complete = True
                    return
            except Exception as error:  # whatever the server's trouble is, training goes on and this is tried again
                self.error, wait = f"{type(error).__name__}: {error}".splitlines()[0], min(wait * 2, 15.0)
            if self.ended.is_set():
                time.sleep(min(wait, 1.0))
            else:
                self.ended.wait(wait)

    def _connect(self) -> None:
        if hasattr(self, "client"):
            return
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name(self.config.name)
        if experiment is None:
            store = self.folder.parent / "mlartifacts" / self.config.name
            location = store.as_uri() if self.uri.startswith("sqlite:") else None
            kind = {"mlflow.experimentKind": "custom_model_development"}  # opens on the runs, not on traces
            self.experiment = client.create_experiment(self.config.name, artifact_location=location, tags=kind)
        else:
            self.experiment = experiment.experiment_id
        self.parent = self._find(client, self.key, self.folder.name, {f"data.{k}": v for k, v in self.data.items()})
        client.update_run(self.parent, status="RUNNING")
        client.log_text(self.parent, dump(self.config), "config.yaml")
        _write_state(self.folder, {"run_id": self.parent, "ended": False})
        self.client = client

    def _find(self, client: Any, key: str, name: str, tags: dict[str, str]) -> str:
        """The run with this key, made if it is not there: a key has one run for ever."""
        found = client.search_runs([self.experiment], f"tags.`sweep.key` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = client.create_run(self.experiment, run_name=name, tags={"sweep.key": key, **tags})
        return str(run.info.run_id)

    def _sync(self, last: bool) -> None:
        if not (self.folder / FILE).exists():
            return
        self.ledger = self.ledger or Ledger.read(self.folder, self.config)
        entries = [entry for entry in self.ledger.entries() if is_drawn(self.folder, entry)]
        for entry in entries:
            self._sync_trial(entry, last)
        if last:
            markdown = leaderboard_markdown(self.config, self.folder, entries)
            self.client.set_tag(self.parent, "mlflow.note.content", markdown)
            ended = [entry for entry in entries if entry.state != "RUNNING"]
            # SCHEDULED: not finished, and nobody works on it until the command is given again.
            finished = len(ended) >= self.config.search.trials
            if finished:
                self.client.set_terminated(self.parent, "FINISHED")
            else:
                self.client.update_run(self.parent, status="SCHEDULED")
            _write_state(self.folder, {"run_id": self.parent, "ended": finished})

    def _sync_trial(self, entry: Entry, last: bool) -> None:
        folder = trial_folder(self.folder, entry.number)
        state = _read_state(folder)
        if state.get("ended"):
            return
        if "run_id" not in state:
            state["run_id"] = self._start(entry)
        self._ship(folder / "metrics.jsonl", state, lambda: _write_state(folder, state))
        run_id = state["run_id"]
        if entry.state == "RUNNING":
            status = "SCHEDULED" if last else "RUNNING"
            if self.known.get(run_id) != status:
                self.client.update_run(run_id, status=status)
                self.known[run_id] = status
            return
        self._artifacts(run_id, entry, folder)
        for name, value in {"state": entry.state, "why": entry.why}.items():
            self.client.set_tag(run_id, f"sweep.{name}", value)
        self.client.set_terminated(run_id, STATUS[entry.state])
        state["ended"] = True
        _write_state(folder, state)

    def _start(self, entry: Entry) -> str:
        from mlflow.entities import Param

        tags = {"mlflow.parentRunId": self.parent, "sweep.trial": str(entry.number)}
        run_id = self._find(self.client, f"{self.key}/{entry.number}", f"trial-{entry.number:04d}", tags)
        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in entry.params.items()])
        return run_id

    def _ship(self, path: Path, state: dict[str, Any], remember: Callable[[], None]) -> None:
        """Send the complete lines that were not sent yet; steps redone after a kill are left out."""
        from mlflow.entities import Metric

        content = b""
        if path.exists():
            with path.open("rb") as file:
                file.seek(state.get("offset", 0))
                content = file.read()
            content = content[: content.rfind(b"\n") + 1]
        highest: dict[str, int] = state.setdefault("highest", {})
        metrics = []
        for line in map(json.loads, content.splitlines()):
            for name, value in line["values"].items():
                if line["step"] > highest.get(name, -1):
                    metrics.append(Metric(name, value, int(line["time"] * 1000), line["step"]))
                    highest[name] = line["step"]
        for start in range(0, len(metrics), CHUNK):
            self.client.log_batch(state["run_id"], metrics=metrics[start : start + CHUNK])
        state["offset"] = state.get("offset", 0) + len(content)
        if content or not (path.parent / "mlflow.json").exists():
            remember()

    def _artifacts(self, run_id: str, entry: Entry, folder: Path) -> None:
        own = folder / "config.yaml"  # what ran: with numbers for balanced classes; a trial that never began has none
        content = own.read_text(encoding="utf-8") if own.exists() else dump(trial_config(self.config, entry.params))
        self.client.log_text(run_id, content, "config.yaml")
        present = {file.path for file in self.client.list_artifacts(run_id)}
        for place, (task, (labels, records)) in enumerate(read_predictions(folder).items()):
            where = "" if place == 0 else f"{task}_"  # as metrics: those of the first task have no prefix
            if labels:
                self.client.log_image(run_id, confusion_picture(records, labels), f"{where}confusion_matrix.png")
            if f"{where}predictions.json" not in present:  # log_table appends
                columns = ("id", "conversation", "speaker", "label", "prediction")
                table = {name: [getattr(record, name) for record in records] for name in columns}
                for number, label in enumerate(labels):
                    table[f"score {label}"] = [record.scores[number] for record in records]
                self.client.log_table(run_id, table, f"{where}predictions.json")


def confusion_picture(records: Sequence[Any], labels: Sequence[str]) -> Any:
    """The confusion matrix as a PIL image."""
    from matplotlib.figure import Figure
    from PIL import Image
    from sklearn.metrics import ConfusionMatrixDisplay

    from model.metrics import confusion

    size = 2.5 + 0.6 * len(labels)
    axes = (figure := Figure(figsize=(size, size), dpi=120, layout="constrained")).add_subplot()
    display = ConfusionMatrixDisplay(confusion(records, labels), display_labels=list(labels))
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45)
    axes.set_title("validation split")
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer)


def _sweep_key(folder: Path) -> str:
    """Names a sweep for ever, on any machine that sees its folder."""
    path = folder / "sweep-id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / "mlflow.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "mlflow.json.unfinished"
    unfinished.write_text(json.dumps(state))
    unfinished.replace(folder / "mlflow.json")
