"""The runs of a sweep on an MLflow server: each is found by its key, created once, and checked before it is trusted.

The tag `sweep.key` identifies a run permanently: `<sweep>` the parent, `<sweep>/<number>` a trial. One search returns
all of them with the newest step of every metric, so it is cheap to detect a server that came back without its database,
or with an older one. A run or an experiment that was deleted in the UI is restored, since the sweep still writes to it.
Of two runs with one key (a request whose answer was lost may have been carried out twice) the older one counts, and the
other is deleted.
"""

import functools
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from model.training.metrics_log import Point
from sweep.analysis.predictions import read_predictions
from sweep.analysis.report.fonts import font_families
from sweep.compat import limit_database_retries, newest_steps
from sweep.config.space import FOLD, Value, encode, whole
from sweep.tracking.dataset import Corpus

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from mlflow.entities import Experiment, Run, RunInfo
    from PIL.Image import Image

    from model.evaluation.metrics import Record

MAX_METRICS = 1000  # of a request
MAX_PARAMS = 100  # of a request
MISSING, DENIED, REFUSED = "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "INVALID_PARAMETER_VALUE"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # schemes of the URIs that MLflow opens without a server
KIND = ("mlflow.experimentKind", "custom_model_development")  # of an experiment that opens on its runs, not on traces
# The tracker retries. A request that the client repeats by itself would hide that the server was unavailable and may
# have come back with another database.
CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the command line owns standard output
}


DATABASE_ATTEMPTS = 4  # to connect to a database, in some seconds; MLflow would try for an hour


class Runs:
    """The runs of a sweep on an MLflow server. Every method raises what the client raises.

    Args:
        uri: of the server or its database.
        key: of the sweep.
        corpus: that every run is linked to; None for a caller that creates no run.
    """

    def __init__(self, uri: str, key: str, corpus: Corpus | None = None) -> None:
        for variable, value in CLIENT.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        if is_database(uri):
            limit_database_retries(DATABASE_ATTEMPTS)
        self.client, self.uri, self.key, self.corpus = MlflowClient(uri), uri, key, corpus
        self.experiment = ""

    def enter(self, parent: str | None, name: str | None, store: Path) -> bool:
        """Find the experiment of the sweep, or create it.

        Args:
            parent: the known run of the sweep, if any; its experiment may have been renamed.
            name: of the experiment to create if there is none; None creates none.
            store: folder for artifacts, where the server is a database.

        Returns:
            Whether there is an experiment.
        """
        experiment = self._experiment_of(parent) or (self._experiment_named(name, store) if name else None)
        self.experiment = experiment or ""
        return experiment is not None

    def _experiment_of(self, parent: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if parent is None:
            return None
        try:
            run = self.client.get_run(parent)
        except MlflowException as error:
            if error.error_code in (MISSING, DENIED):  # a server with accounts denies access to a missing run
                return None
            raise
        if run.data.tags.get("sweep.key") != self.key:
            return None
        return self._restored(self.client.get_experiment(run.info.experiment_id))

    def _experiment_named(self, name: str, store: Path) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            return self._restored(experiment)
        location = store.as_uri() if is_database(self.uri) else None
        return str(self.client.create_experiment(name, artifact_location=location, tags=dict([KIND])))

    def _restored(self, experiment: "Experiment") -> str:
        if _is_deleted(experiment):
            self.client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def find(self) -> dict[str, "Run"]:
        """Return the runs of the sweep, by key."""
        from mlflow.entities import ViewType

        by_key: dict[str, list[Run]] = {}
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
                by_key.setdefault(run.data.tags["sweep.key"], []).append(run)
        return {key: self._only(runs) for key, runs in by_key.items()}

    def _only(self, runs: list["Run"]) -> "Run":
        """Return the oldest run that was not deleted, else the oldest one; restore it, and delete the others."""
        first, *duplicates = sorted(runs, key=lambda run: (_is_deleted(run.info), run.info.start_time, run.info.run_id))
        if _is_deleted(first.info):
            self.client.restore_run(first.info.run_id)
        for run in duplicates:
            if not _is_deleted(run.info):
                self.client.delete_run(run.info.run_id)
        return first

    def create(self, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Value], started: int) -> str:
        """Create a run for a key that `find` did not return, and return its id."""
        corpus = self._corpus_of(params)
        all_tags = {"sweep.key": key, **tags, **(corpus.tags() if corpus else {})}
        run = self.client.create_run(self.experiment, start_time=started, run_name=name, tags=all_tags)
        self.complete(run, params)
        return str(run.info.run_id)

    def complete(self, run: "Run", params: Mapping[str, Value]) -> None:
        """Add the parameters and the corpus if the run lacks them, as after a kill."""
        from mlflow.entities import Param

        if lacking := params.keys() - run.data.params.keys():
            stored = [Param(key, str(encode(value))) for key, value in params.items() if key in lacking]
            for start in range(0, len(stored), MAX_PARAMS):
                self.client.log_batch(run.info.run_id, params=stored[start : start + MAX_PARAMS])
        corpus = self._corpus_of(params)
        if corpus and not (run.inputs and run.inputs.dataset_inputs):
            self.client.log_inputs(run.info.run_id, datasets=[corpus.input()])

    def _corpus_of(self, params: Mapping[str, Value]) -> Corpus | None:
        """Return the corpus of a run: a trial may be on another fold than the sweep."""
        return self.corpus.with_fold(whole(params[FOLD])) if self.corpus and FOLD in params else self.corpus

    def send(self, run_id: str, points: Sequence[Point], tags: Mapping[str, str] | None = None) -> None:
        """Add points and tags to a run; sending them again changes nothing."""
        from mlflow.entities import Metric, RunTag

        metrics = [Metric(point.name, point.value, point.milliseconds, point.step) for point in points]
        run_tags = [RunTag(name, value) for name, value in (tags or {}).items()]
        for start in range(0, max(len(metrics), len(run_tags)), MAX_METRICS):
            chunk = metrics[start : start + MAX_METRICS]
            self.client.log_batch(run_id, metrics=chunk, tags=run_tags if start == 0 else [])

    def delete_tags(self, run_id: str, names: Iterable[str]) -> None:
        """Delete those of some tags that a run has."""
        tags = self.client.get_run(run_id).data.tags
        for name in names:
            if name in tags:
                self.client.delete_tag(run_id, name)

    def steps(self, run_id: str) -> dict[str, set[int]]:
        """Return the steps that the server has, by metric; it takes a request for each metric."""
        names = self.client.get_run(run_id).data.metrics
        return {name: {point.step for point in self.client.get_metric_history(run_id, name)} for name in names}

    def log_artifacts(self, run_id: str, config: str, folder: Path) -> dict[str, str]:
        """Log the configuration, the predictions and the confusion matrices of a trial.

        All files are replaced, so that the half file that a killed server leaves does not stay.

        Returns:
            Tags by which the UI finds the tables among them.
        """
        self.client.log_text(run_id, config, "config.yaml")
        tables = []
        for index, (task, (labels, records)) in enumerate(read_predictions(folder).items()):
            prefix = "" if index == 0 else f"{task}_"  # as for metrics: those of the first task have no prefix
            if labels:
                names_file = f"{prefix}confusion_matrix_labels.txt"
                picture, names = confusion_picture(records, labels, names_file)
                self.client.log_image(run_id, picture, f"{prefix}confusion_matrix.png")
                if names:
                    self.client.log_text(run_id, names, names_file)
            self.client.log_text(run_id, json.dumps(_table(records, labels)), f"{prefix}predictions.json")
            tables.append({"path": f"{prefix}predictions.json", "type": "table"})
        # As `log_table` does, which would append to what is there.
        return {"mlflow.loggedArtifacts": json.dumps(tables)} if tables else {}


def is_database(uri: str) -> bool:
    """Return whether a tracking URI is that of a database, not of a server."""
    return uri.startswith(DATABASES)


def lacks(run: "Run", highest: Mapping[str, int]) -> bool:
    """Return whether a run lacks points that it was sent; an older copy of a database lacks the newest ones first."""
    newest = newest_steps(run)
    return any(newest.get(name, -1) < step for name, step in highest.items())


def now() -> int:
    """Return the time in milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def _is_deleted(info: "Experiment | RunInfo") -> bool:
    return bool(info.lifecycle_stage == "deleted")


class PredictionTable(TypedDict):
    """Predictions in the form that MLflow's UI shows as a table."""

    columns: list[str]
    data: list[list[object]]


def _table(records: "Sequence[Record]", labels: Sequence[str]) -> PredictionTable:
    columns = ("id", "conversation", "speaker", "label", "prediction")
    return {
        "columns": [*columns, *(f"score {label}" for label in labels)],
        "data": [[*(getattr(record, name) for name in columns), *record.scores[: len(labels)]] for record in records],
    }


def confusion_picture(records: "Sequence[Record]", labels: Sequence[str], names_file: str) -> "tuple[Image, str]":
    """Draw the confusion matrix.

    Args:
        records: the predictions.
        labels: in the order of rows and columns.
        names_file: where the names of the labels are found that the picture shows as numbers.

    Returns:
        The picture, and the names of the labels that it shows as numbers, where no font of this machine has their
        characters; else "".
    """
    from PIL import Image

    from model.evaluation.metrics import confusion

    families, title, names = font_families(labels), "validation split", ""
    counts, shown = confusion(records, labels), list(labels)
    if families is None:
        families, shown = font_families(()) or [], [str(number + 1) for number in range(len(labels))]
        title = f"validation split\n(labels: {names_file})"
        names = "".join(f"{number}  {label}\n" for number, label in zip(shown, labels, strict=True))
    figure = _draw_confusion(counts, shown, title, families)
    figure.axes[0].set_position(_position(tuple(shown), title, tuple(families)))
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer), names


def _draw_confusion(counts: np.ndarray, labels: Sequence[str], title: str, families: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    size = 2.5 + 0.6 * len(labels)
    axes = (figure := Figure(figsize=(size, size), dpi=120)).add_subplot()
    display = ConfusionMatrixDisplay(counts, display_labels=list(labels))
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45)
    axes.set_title(title)
    for axis in (axes.xaxis, axes.yaxis):  # a label with dollar signs is no formula
        for text in axis.get_ticklabels():
            text.set_parse_math(False)
            text.set_fontfamily(list(families))
    return figure


@functools.lru_cache(maxsize=8)
def _position(labels: tuple[str, ...], title: str, families: tuple[str, ...]) -> "Bbox":
    """Return the position that leaves room for the labels; finding it takes longer than drawing the rest."""
    figure = _draw_confusion(np.zeros((len(labels), len(labels)), int), labels, title, families)
    figure.set_layout_engine("constrained")
    figure.draw_without_rendering()
    return figure.axes[0].get_position()
