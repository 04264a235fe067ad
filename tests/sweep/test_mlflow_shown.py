"""MLflow as its users expect it: runs that can be sorted, filtered and compared, and the corpus behind them."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweep.config.version import code_version
from sweep.search.study import StudyStore
from sweep.tracking.access import tracking_uri
from sweep.tracking.summary import is_summary
from tests.sweep.common import ask, report
from tests.sweep.tracked import CONFIG, DATA, runs, track


def sums(data: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in data.items() if is_summary(name)}


def test_a_run_can_be_sorted_and_filtered_by(folder: Path) -> None:
    track(folder)
    parent, children = runs(folder)
    shown = [sums(run.data.metrics) for run in children]
    assert shown[0] == {"best_macro_f1": 0.9, "best_loss": 0.5, "objective": 0.8}
    assert shown[1] == {"best_macro_f1": 0.1, "best_loss": 0.1, "objective": 0.1}
    assert shown[2:] == [{}, {}], "one failed before it began, and one has not ended"
    assert sums(parent.data.metrics) == {"best_macro_f1": 0.8, "best_trial": 0.0}
    best = {"sweep.best_trial": "0", "sweep.best_run": children[0].info.run_id, "sweep.code": code_version()}
    assert parent.data.tags.items() >= best.items()
    first = {"sweep.state": "COMPLETE", "sweep.rung": "2", "sweep.seed": "0", "sweep.code": code_version()}
    assert children[0].data.tags.items() >= (first | DATA.tags()).items()
    assert (children[1].data.tags["sweep.rung"], children[2].data.tags["sweep.reason"]) == ("1", "error")
    client, ids = MlflowClient(tracking_uri(folder)), [parent.info.experiment_id]
    ranked = client.search_runs(ids, "attributes.status = 'FINISHED'", order_by=["metrics.objective DESC"])
    assert ranked[0].info.run_id == children[0].info.run_id
    assert [run.info.run_id for run in client.search_runs(ids, "tags.`sweep.state` = 'PRUNED'")] == [
        children[1].info.run_id
    ]


def test_every_run_is_linked_to_the_corpus(folder: Path) -> None:
    track(folder)
    parent, children = runs(folder)
    for run in (parent, *children):
        [used] = run.inputs.dataset_inputs
        assert used.to_dictionary() == DATA.input().to_dictionary()


def test_the_sums_of_a_sweep_follow_its_trials_and_are_told_once(folder: Path) -> None:
    track(folder)
    track(folder)
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95)
    study.complete(3)
    track(folder)
    more = CONFIG.with_values({"search.trials": 5})
    ask(study := StudyStore.open(folder, more), 1)
    study.fail(4, "lost")
    track(folder, more)
    parent, children = runs(folder)
    client = MlflowClient(tracking_uri(folder))
    history = [client.get_metric_history(parent.info.run_id, name) for name in ("best_macro_f1", "best_trial")]
    assert [[(point.step, point.value) for point in points] for points in history] == [
        [(3, 0.8), (4, 0.95)],
        [(3, 0.0), (4, 3.0)],
    ]
    assert parent.data.tags["sweep.best_run"] == children[3].info.run_id
    for run in children:
        for name in sums(run.data.metrics):
            assert len(client.get_metric_history(run.info.run_id, name)) == 1


def test_a_trial_that_goes_on_under_other_code_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track(folder)
    monkeypatch.setattr("sweep.tracking.tracker.code_version", lambda: "2+changed")
    track(folder)
    track(folder)
    _, children = runs(folder)
    codes = [run.data.tags["sweep.code"] for run in children]
    assert codes == [code_version()] * 3 + [f"{code_version()}, 2+changed"]
