"""A view of a sweep in MLflow's UI: its trials by the objective, and charts that compare them.

The UI keeps what a page of runs shows (order, filter, columns, charts) as a tag of the experiment, and a link names the
tag. The fields are those of the UI's share button in mlflow 3.17.2. The tag holds them twice: as a saved view, which
the UI lists by its name, and as the plain fields that older servers read.
"""

import json

from sweep.config.schema import Config
from sweep.tracking.runs import DENIED, REFUSED, Runs, now
from sweep.tracking.summary import LOWER, OBJECTIVE, UPPER

TAG = "mlflow.sharedViewState."
PARENT = "mlflow.parentRunId"
MAX_COLUMNS = 40  # axes in the table and in a chart; a tag of the experiment has room for more than twice as many
MAX_SCATTERS = 6
SECTION = "sweep"  # of the charts
Fields = dict[str, object]


def save_view(runs: Runs, config: Config, parent: str) -> None:
    """Save the view of a sweep on the server; a server that does not take it leaves the links without effect.

    Args:
        runs: of the sweep.
        config: of the sweep.
        parent: run of the sweep.
    """
    from mlflow.exceptions import MlflowException

    fields = view_fields(config, parent)
    time = now()
    saved = {"name": f"{config.name}: trials by {config.search.metric}", "createdAt": time, "updatedAt": time}
    try:
        runs.client.set_experiment_tag(
            runs.experiment, f"{TAG}{runs.key}", json.dumps({**fields, **saved, "state": json.dumps(fields)})
        )
    except MlflowException as error:
        if error.error_code not in (REFUSED, DENIED):
            raise


def trials_link(experiment: str, key: str) -> str:
    """Return the address of the table of a sweep's trials within MLflow's UI, wherever it is served."""
    return f"#/experiments/{experiment}/runs?viewStateShareKey={key}"


def charts_link(experiment: str, key: str) -> str:
    """Return the address of the charts that compare a sweep's trials."""
    return f"{trials_link(experiment, key)}&compareRunsMode=CHART"


def view_fields(config: Config, parent: str) -> Fields:
    """Return what the UI shows of a sweep: the trials alone, best first, with objective, interval and axes as columns.

    Sorted by a metric, the table has a row for each trial; by time, it would hide them below the sweep's run.
    """
    axes = list(config.search.space)[:MAX_COLUMNS]
    columns = [_key("metrics", name) for name in (OBJECTIVE, LOWER, UPPER)] + [_key("params", axis) for axis in axes]
    return {
        "searchFilter": f"tags.`{PARENT}` = '{parent}'",
        "orderByKey": _key("metrics", OBJECTIVE),
        "orderByAsc": config.search.direction == "minimize",
        "selectedColumns": columns,
        "runsHiddenMode": "SHOW_ALL",  # of a page of runs, in the charts
        "isAccordionReordered": True,  # or the UI would put its own sections first
        "compareRunSections": [
            {"uuid": SECTION, "name": SECTION, "display": True, "isReordered": False, "deleted": False}
        ],
        "compareRunCharts": _charts(config, axes),
    }


def _key(kind: str, name: str) -> str:
    """Return the name of a column."""
    return f"{kind}.`{name}`"


def _charts(config: Config, axes: list[str]) -> list[Fields]:
    """Return the charts: all axes with the objective, the objective of each trial, its course, and each number axis."""
    chart: Fields = {"deleted": False, "isGenerated": False, "metricSectionId": SECTION, "runsCountToCompare": 100}
    charts: list[Fields] = []
    if axes:
        charts.append({"type": "PARALLEL", "selectedParams": axes, "selectedMetrics": [OBJECTIVE], "showAllRuns": True})
    charts.append({"type": "BAR", "metricKey": OBJECTIVE})
    charts.append(
        {
            "type": "LINE",
            "metricKey": config.search.metric,
            "lineSmoothness": 0,
            "xAxisKey": "step",
            "useGlobalXaxisKey": True,
        }
    )
    numbers = [name for name in axes if config.search.space[name].is_numeric][:MAX_SCATTERS]
    for name in numbers:
        axis = {"xaxis": {"key": name, "type": "PARAM"}, "yaxis": {"key": OBJECTIVE, "type": "METRIC"}}
        charts.append({"type": "SCATTER", **axis})
    return [{**chart, "uuid": f"{SECTION}-{index}", **content} for index, content in enumerate(charts)]
