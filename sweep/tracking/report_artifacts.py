"""A report beside the runs that it is about."""

import os
from collections.abc import Sequence
from pathlib import Path

from data.errors import reason
from sweep.tracking.access import tracking_uri
from sweep.tracking.runs import CLIENT
from sweep.tracking.tracker import parent_run_id


def to_mlflow(folder: Path, written: Sequence[Path]) -> str:
    """Log the files of a report as artifacts of the sweep's run; what came of it, in words.

    A server that is away is no reason to have no report.
    """
    run_id = parent_run_id(folder)
    if run_id is None:
        return "not there, since the sweep has no run yet"
    for variable, value in CLIENT.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri(folder))
        for path in written:
            client.log_artifact(run_id, str(path), "report")
    except Exception as error:  # whatever the client raises
        return f"not there ({reason(error)}); give the command again"
    return "artifacts of the sweep's run, under report"
