"""The address of MLflow, and the check before the first trial that the user may write there."""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from data.errors import UserError, reason
from sweep.config.paths import near, shell_command, sqlite_uri
from sweep.tracking.runs import DENIED, KIND, Runs, is_database
from sweep.tracking.uri_check import check_uri

PORT = 5000  # of the server that the user starts to look at a database
# In errors of mlflow 3.17.2 about an answer that no MLflow server gives; its own errors are JSON.
NOT_MLFLOW = (
    "response body was not in a valid JSON format",
    *(f"failed with error code {status} != 200" for status in (301, 302, 307, 308, 400, 404, 405, 501)),
)
NO_DATABRICKS = "Reading Databricks credential configuration failed"
CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def tracking_uri(folder: Path) -> str:
    """Return $MLFLOW_TRACKING_URI, or a SQLite database beside the sweep's folder.

    Raises:
        UserError: it contains a user's name or password, which MLflow's errors would show.
    """
    return given_uri() or sqlite_uri(_database(folder.absolute()))


def _database(folder: Path) -> Path:
    return folder.parent / "mlflow.db"


def given_uri() -> str:
    """Return $MLFLOW_TRACKING_URI; "" if it is not set.

    Raises:
        UserError: see `tracking_uri`.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    url = urlsplit(uri)
    if url.password is not None or (url.username is not None and url.scheme.startswith("http")):
        raise UserError(
            "MLFLOW_TRACKING_URI: contains a user's name or password, which logs and a job's metadata would show; "
            "remove it, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a database: PGPASSWORD)"
        )
    return uri


def ui_command(folder: Path, program: str | Path = "mlflow") -> str:
    """Return the command that serves the UI with the runs; for a server, its address."""
    uri = given_uri()
    if uri and not is_database(uri):
        return uri
    uri = uri or sqlite_uri(near(_database(folder.absolute())))
    return shell_command(program, "server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(PORT))


def ui_address(uri: str) -> str | None:
    """Return the address of the UI, which `ui_command` starts for a database; None for a service with another UI."""
    if is_database(uri):
        return f"http://127.0.0.1:{PORT}"
    return uri.rstrip("/") if uri.startswith("http") else None


def check_access(uri: str, name: str, warn: Callable[[str], object] = lambda line: None) -> None:
    """Check that a server lets this user write; an unavailable server is no reason not to train.

    Args:
        uri: of the server or its database.
        name: of the experiment, which is the sweep's.
        warn: shows a line to the user when the server does not answer.

    Raises:
        UserError: the URI can never work, the server is not MLflow's, or it rejects the user.
    """
    check_uri(uri)
    if not uri.startswith(("http", "databricks")):
        return
    from mlflow.exceptions import MlflowException

    client = Runs(uri, "").client
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            client.set_experiment_tag(experiment.experiment_id, *KIND)  # a sweep's experiment has this tag already
    except MlflowException as error:
        if (why := denial(error)) is not None:
            raise UserError(f"MLflow at {uri} {why}") from None
        if any(sign in str(error) for sign in NOT_MLFLOW):
            raise UserError(
                f"MLFLOW_TRACKING_URI {uri}: this server is not MLflow's ({reason(error)[:200]}); fix the address, or "
                "unset it for a file beside --out"
            ) from None
        if NO_DATABRICKS in str(error):
            raise UserError(
                f"MLFLOW_TRACKING_URI {uri}: no credentials of Databricks; set DATABRICKS_HOST and DATABRICKS_TOKEN, "
                "or name a profile of ~/.databrickscfg, databricks://PROFILE"
            ) from None
        warn(f"MLflow at {uri} does not answer now; the trials start, and their results are sent once it does")


def denial(error: Exception) -> str | None:
    """Return why a server rejects the user and what to do; None if it does not."""
    code = getattr(error, "error_code", None)
    if code == "UNAUTHENTICATED":
        return f"rejects this user and password; set {CREDENTIALS} as its administrator gave them"
    if code != DENIED:
        return None
    if "Host header" in str(error):
        return "rejects this host name; its administrator can allow it"
    return "does not let this user write to the experiment of this name, another user's; use another one, --set name=…"
