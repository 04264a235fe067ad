"""Where MLflow is, and whether it takes what a sweep will send: asked before the first trial, told in plain words."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from data.errors import UserError
from sweep.config.paths import near
from sweep.tracking.runs import DENIED, KIND, Runs

CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def tracking_uri(folder: Path) -> str:
    """$MLFLOW_TRACKING_URI, or SQLite beside the sweep's folder.

    Raises:
        UserError: it holds a user's name or password, which MLflow's errors would show.
    """
    return given_uri() or f"sqlite:///{folder.absolute().parent / 'mlflow.db'}"


def given_uri() -> str:
    """$MLFLOW_TRACKING_URI; "" if it is not set.

    Raises:
        UserError: see `tracking_uri`.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    place = urlsplit(uri)
    if place.password is not None or (place.username is not None and place.scheme.startswith("http")):
        raise UserError(
            "MLFLOW_TRACKING_URI: holds a user's name or password, which logs and a job's metadata would show; take it "
            "out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a database: PGPASSWORD)"
        )
    return uri


def ui_command(folder: Path, program: str = "mlflow") -> str:
    """What a person types to look at the runs."""
    uri = tracking_uri(folder)
    if not uri.startswith("sqlite:///"):
        return f"open {uri}"
    database = Path(uri.removeprefix("sqlite:///"))
    return f"{program} server --backend-store-uri sqlite:///{near(database)} --host 127.0.0.1 --port 5000"


def check_access(uri: str, name: str) -> None:
    """Look whether a server lets this user write. One that is away is no reason not to train.

    Args:
        uri: of the server or its database.
        name: of the experiment, which is the sweep's.

    Raises:
        UserError: it turns the user away.
    """
    from mlflow.exceptions import MlflowException

    if not uri.startswith("http"):
        return
    client = Runs(uri, "").client
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            client.set_experiment_tag(experiment.experiment_id, *KIND)  # which it has, if a sweep made it
    except MlflowException as error:
        if (why := denial(error)) is not None:
            raise UserError(f"MLflow at {uri} {why}") from None


def denial(error: Exception) -> str | None:
    """Why a server turns the user away, and what to do; None where it does not."""
    code = getattr(error, "error_code", None)
    if code == "UNAUTHENTICATED":
        return f"does not know this user and password; set {CREDENTIALS} as its administrator gave them"
    if code != DENIED:
        return None
    if "Host header" in str(error):
        return "does not go by this name; its administrator can allow it"
    return "does not let this user write to the experiment of this name, another user's; give another one, --set name=…"
