"""Fixtures of this folder: a working folder for commands, and a sweep for the tracker."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from transformers.utils.logging import disable_progress_bar

from data.shards.dataset import Shards
from sweep.runner import SweepRunner
from tests.sweep.cached import Sweeps, small_corpus
from tests.sweep.common import sweep
from tests.sweep.mlflow_server import Server
from tests.sweep.tracked import make_sweep

COLUMNS = (
    "transcript_id,mi_quality,video_url,utterance_id,interlocutor,timestamp,utterance_text,client_talk_type,"
    "main_therapist_behaviour"
)
CSV = {
    "no-column.csv": "transcript_id,utterance_id\n1,0\n",
    "label.csv": f"{COLUMNS}\n1,high,v,0,client,00:00:01,hi,change,\n1,high,v,1,client,00:00:02,hi,chnge,\n",
    "few.csv": f"{COLUMNS}\n1,high,v,0,client,00:00:01,hi,change,\n",
}


@pytest.fixture(scope="session")
def place(models: Path, corpus: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with settings, CSV files and a folder that is not empty."""
    model = {"encoder": {"path": str(models / "hubert-group")}, "llm": {"path": str(models / "llm")}}
    data = {"shards": str(corpus.folder), "history": 2, "reader": "local"}
    train = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01}
    good: dict[str, Any] = {"name": "t", "data": data, "model": model | {"modality": "text+speech"}, "train": train}
    folder = tmp_path_factory.mktemp("place")
    (folder / "good.yaml").write_text(json.dumps(good))
    (folder / "axis.yaml").write_text(json.dumps(good | {"search": {"space": {"train.epoch": [1]}}}))
    for name, content in CSV.items():
        (folder / name).write_text(content)
    (folder / "taken").mkdir()
    (folder / "taken/note").touch()
    return folder


@pytest.fixture(scope="session")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a trained trial."""
    folder = tmp_path_factory.mktemp("trained") / "trial"
    assert sweep("train", place / "good.yaml", "--out", folder).code == 0
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of `place`; a sweep that would start Ray fails."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    disable_progress_bar()  # as main() does before transformers is imported
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SweepRunner, "execute", lambda *_: pytest.fail("Ray would start"))
    return tmp_path


@pytest.fixture
def trial(here: Path, trained: Path) -> Path:
    """Return a copy of the trained trial in the working folder."""
    return Path(shutil.copytree(trained, here / "trial"))


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty MLflow database, which takes seconds to create."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a sweep with a complete, a pruned, a failed and a running trial."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return make_sweep(tmp_path / "sweep", database)


@pytest.fixture
def server(database: Path, tmp_path: Path) -> Iterator[Server]:
    """Run an MLflow server."""
    (folder := tmp_path / "server").mkdir()
    server = Server(folder, database)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def sweeps(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    return Sweeps(models, small_corpus(tmp_path_factory.mktemp("corpus") / "shards"))
