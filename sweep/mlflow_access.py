"""Whether an MLflow server takes what a sweep will send: asked before the first trial, and told in plain words."""

from urllib.parse import urlsplit

from data.errors import UserError
from sweep.mlflow_runs import DENIED, KIND, Runs

CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


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
            raise UserError(f"MLflow at {address(uri)} {why}") from None


def address(uri: str) -> str:
    """A server's address without user and password: they are nobody's to print."""
    place = urlsplit(uri)
    return f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}"


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
