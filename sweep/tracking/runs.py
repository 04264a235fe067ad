"""The runs of a sweep on an MLflow server: each found by its key, made once, and never taken on trust.

The tag `sweep.key` names a run for ever: `<sweep>` the parent's, `<sweep>/<number>` a trial's. One search shows all of
them and the newest step of every metric, so it costs little to find out that a server came back without its database,
or with an older one. A run or an experiment that was deleted in the UI is restored: as long as its sweep is worked on,
its runs belong to it. Of two runs with one key (a request whose answer was lost may have been made twice on its way)
the older one counts, and the other is deleted.
"""

import functools
import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.training.metrics_log import Point
from sweep.analysis.predictions import read_predictions
from sweep.compat import newest_steps
from sweep.config.space import FOLD
from sweep.tracking.dataset import Corpus

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from mlflow.entities import Run

CHUNK = 1000  # metrics a request may hold
PARAMS = 100  # params a request may hold
MISSING, DENIED, REFUSED = "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "INVALID_PARAMETER_VALUE"
KIND = ("mlflow.experimentKind", "custom_model_development")  # of an experiment that opens on its runs, not on traces
# Trying again is the tracker's work. A request that the client repeats by itself would hide that the server was away
# and may have come back as another one.
CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # what is printed there is ours
}


class Runs:
    """A sweep's part of an MLflow server. Every method raises what the client raises when the server is in trouble."""

    def __init__(self, uri: str, key: str, corpus: Corpus | None = None) -> None:
        """Nothing is asked of the server yet.

        Args:
            uri: of the server or its database.
            key: of the sweep.
            corpus: that every run reads; None for one who makes no run.
        """
        for variable, value in CLIENT.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self.client, self.uri, self.key, self.corpus = MlflowClient(uri), uri, key, corpus
        self.experiment = ""

    def enter(self, parent: str | None, name: str | None, store: Path) -> bool:
        """Go to the experiment of the sweep.

        Args:
            parent: the run that the sweep had here, if it is known; its experiment may have got another name.
            name: of the experiment that is made if there is none; None makes none.
            store: folder for artifacts, where the server is a database.

        Returns:
            Whether there is one.
        """
        found = self._former_experiment(parent) or (self._experiment(name, store) if name else None)
        self.experiment = found or ""
        return found is not None

    def _former_experiment(self, parent: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if parent is None:
            return None
        try:
            run = self.client.get_run(parent)
        except MlflowException as error:
            if error.error_code in (MISSING, DENIED):  # what a server with accounts says of a run that it has not
                return None
            raise
        if run.data.tags.get("sweep.key") != self.key:
            return None
        return self._alive(self.client.get_experiment(run.info.experiment_id))

    def _experiment(self, name: str, store: Path) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            return self._alive(experiment)
        location = store.as_uri() if self.uri.startswith("sqlite:") else None
        return str(self.client.create_experiment(name, artifact_location=location, tags=dict([KIND])))

    def _alive(self, experiment: Any) -> str:
        if _deleted(experiment):
            self.client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def look(self) -> dict[str, "Run"]:
        """The runs of the sweep, by key."""
        from mlflow.entities import ViewType

        found: dict[str, list[Run]] = {}
        page = None
        while page is None or page.token:
            page = self.client.search_runs(
                [self.experiment],
                f"tags.`sweep.key` LIKE '{self.key}%'",
                run_view_type=ViewType.ALL,
                max_results=1000,
                page_token=page.token if page else None,
            )
            for run in page:
                found.setdefault(run.data.tags["sweep.key"], []).append(run)
        return {key: self._only(runs) for key, runs in found.items()}

    def _only(self, runs: list["Run"]) -> "Run":
        """The run that counts: the oldest that nobody deleted, else the oldest."""
        first, *others = sorted(runs, key=lambda run: (_deleted(run.info), run.info.start_time, run.info.run_id))
        if _deleted(first.info):
            self.client.restore_run(first.info.run_id)
        for other in others:
            if not _deleted(other.info):
                self.client.delete_run(other.info.run_id)
        return first

    def make(self, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any], started: int) -> str:
        """A new run; only for a key that `look` did not show."""
        corpus = self._read(params)
        told = {"sweep.key": key, **tags, **(corpus.tags() if corpus else {})}
        run = self.client.create_run(self.experiment, start_time=started, run_name=name, tags=told)
        self.mend(run, params)
        return str(run.info.run_id)

    def mend(self, run: "Run", params: Mapping[str, Any]) -> None:
        """Add what a run is without: of a run, a kill leaves as much as had been sent."""
        if not run.data.params.keys() >= params.keys():
            self._params(run.info.run_id, params)
        corpus = self._read(params)
        if corpus and not (run.inputs and run.inputs.dataset_inputs):
            self.client.log_inputs(run.info.run_id, datasets=[corpus.input()])

    def _read(self, params: Mapping[str, Any]) -> Corpus | None:
        """The corpus as a run reads it: a trial may have a fold of its own."""
        return self.corpus.with_fold(params[FOLD]) if self.corpus and FOLD in params else self.corpus

    def _params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        told = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(told), PARAMS):
            self.client.log_batch(run_id, params=told[start : start + PARAMS])

    def send(self, run_id: str, points: Sequence[Point], tags: Mapping[str, str] | None = None) -> None:
        """Add points to the curves of a run, and tags; the same ones again change nothing."""
        from mlflow.entities import Metric, RunTag

        told = [Metric(point.name, point.value, point.milliseconds, point.step) for point in points]
        own = [RunTag(name, value) for name, value in (tags or {}).items()]
        for start in range(0, max(len(told), len(own)), CHUNK):
            self.client.log_batch(run_id, metrics=told[start : start + CHUNK], tags=own if start == 0 else [])

    def steps(self, run_id: str) -> dict[str, set[int]]:
        """The steps that the server has, by metric; a request for each metric."""
        names = self.client.get_run(run_id).data.metrics
        return {name: {point.step for point in self.client.get_metric_history(run_id, name)} for name in names}

    def artifacts(self, run_id: str, config: str, folder: Path) -> dict[str, str]:
        """Add what a trial leaves: its configuration, its predictions, and confusion matrices.

        Everything is written whole and anew, so that half a file, as a killed server leaves it, does not stay.

        Returns:
            Tags by which the UI finds the tables among them.
        """
        self.client.log_text(run_id, config, "config.yaml")
        tables = []
        for place, (task, (labels, records)) in enumerate(read_predictions(folder).items()):
            where = "" if place == 0 else f"{task}_"  # as metrics: those of the first task have no prefix
            if labels:
                self.client.log_image(run_id, confusion_picture(records, labels), f"{where}confusion_matrix.png")
            self.client.log_text(run_id, json.dumps(_table(records, labels)), f"{where}predictions.json")
            tables.append({"path": f"{where}predictions.json", "type": "table"})
        # As `log_table` does, which would append to what is there.
        return {"mlflow.loggedArtifacts": json.dumps(tables)} if tables else {}


def lacks(run: "Run", highest: Mapping[str, int]) -> bool:
    """Whether a run is without points that it was sent: the newest of a metric are the first that an older copy of a
    database is without."""
    newest = newest_steps(run)
    return any(newest.get(name, -1) < step for name, step in highest.items())


def now() -> int:
    """In milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def _deleted(info: Any) -> bool:
    return bool(info.lifecycle_stage == "deleted")


def _table(records: Sequence[Any], labels: Sequence[str]) -> dict[str, list[Any]]:
    """Predictions in the form that the UI shows as a table."""
    columns = ("id", "conversation", "speaker", "label", "prediction")
    return {
        "columns": [*columns, *(f"score {label}" for label in labels)],
        "data": [[*(getattr(record, name) for name in columns), *record.scores[: len(labels)]] for record in records],
    }


def confusion_picture(records: Sequence[Any], labels: Sequence[str]) -> Any:
    """The confusion matrix as a PIL image."""
    from PIL import Image

    from model.evaluation.metrics import confusion

    figure = _drawn(confusion(records, labels), labels)
    figure.axes[0].set_position(_place(tuple(labels)))
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer)


def _drawn(counts: np.ndarray, labels: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    size = 2.5 + 0.6 * len(labels)
    axes = (figure := Figure(figsize=(size, size), dpi=120)).add_subplot()
    display = ConfusionMatrixDisplay(counts, display_labels=list(labels))
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45)
    axes.set_title("validation split")
    return figure


@functools.lru_cache(maxsize=8)
def _place(labels: tuple[str, ...]) -> "Bbox":
    """Where the matrix has room for the words around it: to find that takes longer than all the rest of a picture."""
    figure = _drawn(np.zeros((len(labels), len(labels)), int), labels)
    figure.set_layout_engine("constrained")
    figure.draw_without_rendering()
    return figure.axes[0].get_position()
