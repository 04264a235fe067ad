"""The best trial's model on the MLflow server: its files as artifacts of its run, and a version in the registry.

A run has at most one version. The alias `best` marks the version that counts now, so `models:/<sweep>@best` also loads
what an extended sweep finds later. A registered model belongs to the sweep that created it: a later sweep of the same
name registers `<sweep>-<first 8 characters of its id>`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.config.paths import trial_folder
from sweep.search.study import TrialRecord
from sweep.tracking.runs import MISSING, Runs
from sweep.tracking.summary import base_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS, ALIAS, OWNER = "model", "best", "sweep.key"
MAX_BYTES = 10**9  # of a checkpoint that is sent: the server stores it, and the sweep's end waits for it
EXISTS = "RESOURCE_ALREADY_EXISTS"


def publish(runs: Runs, name: str, folder: Path, trial: TrialRecord, run_id: str) -> str | None:
    """Log the model of a trial and mark it as the sweep's best version; repeating it changes nothing.

    Args:
        runs: of the sweep.
        name: of the sweep.
        folder: of the sweep.
        trial: its best trial.
        run_id: of that trial.

    Returns:
        The version; None if there is no checkpoint, or a too large one.
    """
    from model.checkpoints import checkpoint  # imports torch, which readers of `mlflow.json` need not

    path = trial_folder(folder, trial.number) / checkpoint.FILE
    if not path.exists() or path.stat().st_size > MAX_BYTES:
        return None
    # What `sweep evaluate` needs of a trial's folder.
    _send_files(runs.client, [path, path.with_name("config.yaml")], run_id)
    name = _registered_name(runs.client, name, runs.key)
    version = _version(runs.client, name, trial, run_id)
    if _best_version(runs.client, name) != version:
        runs.client.set_registered_model_alias(name, ALIAS, version)
    return version


def _send_files(client: "MlflowClient", paths: Sequence[Path], run_id: str) -> None:
    """Send the files that the run lacks or has only in part."""
    sizes = {file.path: file.file_size for file in client.list_artifacts(run_id, ARTIFACTS)}
    for path in paths:
        if path.exists() and sizes.get(f"{ARTIFACTS}/{path.name}") != path.stat().st_size:
            client.log_artifact(run_id, str(path), ARTIFACTS)


def _version(client: "MlflowClient", name: str, trial: TrialRecord, run_id: str) -> str:
    """Return the version of a run; create it if there is none."""
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        return str(version.version)
    source = f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACTS}"
    about = f"trial {trial.number}: `sweep evaluate` reads checkpoint.pt, which holds only what was trained"
    tags = {"sweep.trial": str(trial.number)} | base_tags(trial)
    created = client.create_model_version(name, source, run_id, tags=tags, description=about, await_creation_for=0)
    return str(created.version)


def _registered_name(client: "MlflowClient", name: str, key: str) -> str:
    """Return the name of the sweep's registered model; create the model if there is none."""
    from mlflow.exceptions import MlflowException

    unique = f"{name}-{key[:8]}"
    for candidate in (name, unique):
        try:
            client.create_registered_model(candidate, tags={OWNER: key})
        except MlflowException as error:
            if error.error_code != EXISTS:
                raise
        if client.get_registered_model(candidate).tags.get(OWNER) == key:
            return candidate
    return unique


def _best_version(client: "MlflowClient", name: str) -> str | None:
    """Return the version that has the alias, if any."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, ALIAS).version)
    except MlflowException as error:
        if error.error_code not in (MISSING, "INVALID_PARAMETER_VALUE"):  # stores differ for a missing alias
            raise
        return None
