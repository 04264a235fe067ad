"""The best trial's model on the MLflow server: its files on its run, and a version in the registry.

A version is made once for a run. The alias `best` says which of them counts now, so whoever loads
`models:/<sweep>@best` gets what an extended sweep found later. A registered model belongs to the sweep that made it: a
later one of the same name registers `<sweep>-<first 8 of its id>`.
"""

from pathlib import Path
from typing import Any

from model.checkpoints import checkpoint
from sweep.config.paths import trial_folder
from sweep.search.study import TrialRecord
from sweep.tracking.runs import MISSING, Runs

FILES = (checkpoint.FILE, "config.yaml")  # what `sweep evaluate` needs of a trial's folder
PLACE, ALIAS, OWNER = "model", "best", "sweep.key"
LARGEST = 10**9  # bytes of a checkpoint that is sent: the server keeps it, and the sweep's end waits for it
EXISTS = "RESOURCE_ALREADY_EXISTS"


def publish(runs: Runs, name: str, folder: Path, entry: TrialRecord, run_id: str) -> str | None:
    """Log the model of a trial and make it the best version of the sweep's; again, nothing changes.

    Args:
        runs: of the sweep.
        name: of the sweep.
        folder: of the sweep.
        entry: of its best trial.
        run_id: of that trial.

    Returns:
        The version; None where there is no checkpoint, or one that is too large.
    """
    own = trial_folder(folder, entry.number)
    path = own / checkpoint.FILE
    if not path.exists() or path.stat().st_size > LARGEST:
        return None
    _send(runs.client, own, run_id)
    name = _register(runs.client, name, runs.key)
    version = _version(runs.client, name, entry, run_id)
    if _aliased(runs.client, name) != version:
        runs.client.set_registered_model_alias(name, ALIAS, version)
    return version


def _send(client: Any, folder: Path, run_id: str) -> None:
    """Those files that the run lacks, or has only in part."""
    there = {file.path: file.file_size for file in client.list_artifacts(run_id, PLACE)}
    for path in (folder / name for name in FILES):
        if path.exists() and there.get(f"{PLACE}/{path.name}") != path.stat().st_size:
            client.log_artifact(run_id, str(path), PLACE)


def _version(client: Any, name: str, entry: TrialRecord, run_id: str) -> str:
    """The version of a run, made where there is none."""
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        return str(known.version)
    source = f"{client.get_run(run_id).info.artifact_uri}/{PLACE}"
    about = f"trial {entry.number}: `sweep evaluate` reads checkpoint.pt, which holds only what was trained"
    tags = {"sweep.trial": str(entry.number)}
    made = client.create_model_version(name, source, run_id, tags=tags, description=about, await_creation_for=0)
    return str(made.version)


def _register(client: Any, name: str, key: str) -> str:
    """The name of the sweep's own registered model, which is made where there is none."""
    from mlflow.exceptions import MlflowException

    own = f"{name}-{key[:8]}"
    for free in (name, own):
        try:
            client.create_registered_model(free, tags={OWNER: key})
        except MlflowException as error:
            if error.error_code != EXISTS:
                raise
        if client.get_registered_model(free).tags.get(OWNER) == key:
            return free
    return own


def _aliased(client: Any, name: str) -> str | None:
    """The version that is the best so far."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, ALIAS).version)
    except MlflowException as error:
        if error.error_code not in (MISSING, "INVALID_PARAMETER_VALUE"):  # what stores say of an alias that is not set
            raise
        return None
