"""The best model on the server: sent once, one version per run, and an alias that follows the sweep."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from sweep.config.paths import trial_folder
from sweep.search.study import StudyStore
from sweep.search.study_storage import sweep_id
from sweep.tracking import registry
from sweep.tracking.access import tracking_uri
from sweep.tracking.tracker import is_sent, mlflow_run_id
from tests.sweep.common import ask, report
from tests.sweep.tracked import CONFIG, append, runs, track

MORE = CONFIG.with_values({"search.trials": 5})


def trained(folder: Path, number: int, content: bytes = b"weights") -> None:
    append(folder, number)
    (trial_folder(folder, number) / "checkpoint.pt").write_bytes(content)


def versions(folder: Path) -> list[tuple[str, str | None]]:
    """Return each version with its run; the last one is that of the alias."""
    client = MlflowClient(tracking_uri(folder))
    registered = [(version.version, version.run_id) for version in client.search_model_versions()]
    best = client.get_model_version_by_alias(CONFIG.name, "best")
    return [(str(version), run) for version, run in sorted(registered)] + [(str(best.version), best.run_id)]


@pytest.fixture
def ended(folder: Path) -> Path:
    """The folder of a sweep whose best trial is 0, with a checkpoint."""
    trained(folder, 0)
    StudyStore.open(folder, CONFIG).fail(3, "lost")
    track(folder)
    assert is_sent(folder)
    return folder


def test_best_trial_is_a_version_with_its_files(ended: Path) -> None:
    run_id = mlflow_run_id(ended, 0)
    assert versions(ended) == [("1", run_id)] * 2
    client = MlflowClient(tracking_uri(ended))
    version = client.get_model_version_by_alias(CONFIG.name, "best")
    assert version.source == f"{client.get_run(run_id).info.artifact_uri}/model"
    folder = Path(client.download_artifacts(run_id, "model", str(ended.parent)))
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "config.yaml"}
    assert (folder / "checkpoint.pt").read_bytes() == b"weights"
    for run in runs(ended)[1][1:]:
        assert client.list_artifacts(run.info.run_id, "model") == []


def test_same_best_trial_has_one_version(ended: Path) -> None:
    track(ended)
    for state in ended.rglob("mlflow.json"):
        state.unlink()
    track(ended)
    assert versions(ended) == [("1", mlflow_run_id(ended, 0))] * 2


@pytest.mark.parametrize(("value", "best"), [(0.95, 4), (0.5, 0)])
def test_alias_follows_an_extended_sweep(value: float, best: int, ended: Path) -> None:
    ask(study := StudyStore.open(ended, MORE), 1)
    trained(ended, 4, b"better")
    track(ended, MORE)
    assert len(versions(ended)) == 2, "no version of a sweep that has not ended"
    report(study, 4, 0.95, 0.95, value)  # epoch 3 is no rung
    study.complete(4)
    track(ended, MORE)
    known = [("1", mlflow_run_id(ended, 0))]
    new = [("2", mlflow_run_id(ended, 4))] if best == 4 else []
    assert versions(ended) == [*known, *new, [*known, *new][-1]]


def test_half_file_is_sent_again(ended: Path) -> None:
    run_id, client = mlflow_run_id(ended, 0), MlflowClient(tracking_uri(ended))
    [stored] = (ended.parent / "mlartifacts").rglob("checkpoint.pt")
    stored.write_bytes(b"wei")
    track(ended)
    assert stored.read_bytes() == b"weights"
    shutil.rmtree(stored.parent)
    track(ended)
    assert {file.path for file in client.list_artifacts(run_id, "model")} == {
        "model/checkpoint.pt",
        "model/config.yaml",
    }
    assert len(versions(ended)) == 2


@pytest.mark.parametrize("why", ["none", "large"])
def test_no_checkpoint_means_no_version(why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "large":
        trained(folder, 0)
        monkeypatch.setattr(registry, "MAX_BYTES", 3)
    StudyStore.open(folder, CONFIG).fail(3, "lost")
    track(folder)
    assert is_sent(folder)
    with pytest.raises(MlflowException, match="not found"):
        versions(folder)


def test_model_of_another_sweep_is_not_changed(ended: Path) -> None:
    """Two sweeps of one name on one server: neither takes the other's alias, whichever is extended."""
    other = Path(shutil.copytree(ended, ended.with_name("other")))
    for path in (*other.rglob("mlflow.json"), other / "sweep-id"):
        path.unlink()
    for folder in (other, ended, other):
        track(folder)
    client = MlflowClient(tracking_uri(ended))
    names = {model.name for model in client.search_registered_models()}
    own = f"{CONFIG.name}-{sweep_id(other)[:8]}"
    assert names == {CONFIG.name, own}
    for name, folder in {CONFIG.name: ended, own: other}.items():
        assert client.get_model_version_by_alias(name, "best").run_id == mlflow_run_id(folder, 0)
        assert len(client.search_model_versions(f"name = '{name}'")) == 1
