"""Reports as artifacts of the MLflow run that they are about."""

from collections.abc import Sequence
from pathlib import Path

from data.errors import reason
from sweep.tracking.access import tracking_uri
from sweep.tracking.runs import Runs
from sweep.tracking.tracker import parent_run_id


def to_mlflow(folder: Path, written: Sequence[Path]) -> str:
    """Log the files of a report as artifacts of the sweep's run; return where they are, or why they are not there.

    An unavailable server does not fail the report.
    """
    run_id = parent_run_id(folder)
    if run_id is None:
        return "not logged, since the sweep has no run yet"
    try:
        client = Runs(tracking_uri(folder), "").client
        for path in written:
            client.log_artifact(run_id, str(path), "report")
    except Exception as error:  # whatever the client raises
        return f"not logged ({reason(error)}); rerun the same command"
    return "artifacts of the sweep's run, under report"
