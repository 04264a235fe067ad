"""The private interfaces in `sweep/compat.py` exist and still behave as the sweep expects."""

import inspect

import optuna
import pytest
import ray
from mlflow.entities import Metric, Run, RunData, RunInfo
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState, create_trial
from ray._private.state import GlobalState
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.tune.execution import class_cache

from sweep import compat


def test_running_trial_is_writable() -> None:
    study = optuna.create_study()
    study.add_trial(create_trial(state=TrialState.RUNNING))
    compat.writable_trial(study, study.trials[0]).set_user_attr("key", "value")
    assert study.trials[0].user_attrs == {"key": "value"}


def test_enqueued_trial_keeps_its_values() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"x": 3})
    assert study.trials[0].system_attrs[compat.FIXED_PARAMS] == {"x": 3}


def test_journal_and_database_formats_are_known() -> None:
    assert compat.CREATE_STUDY == JournalOperation.CREATE_STUDY
    from optuna.storages._rdb.models import VersionInfoModel

    assert VersionInfoModel.__tablename__ == compat.VERSION_TABLE


def test_ray_reports_draining_nodes() -> None:
    assert not inspect.signature(GlobalState().get_draining_nodes).parameters


def test_hidden_variables_are_not_propagated(monkeypatch) -> None:
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {"AWS_SECRET_ACCESS_KEY", "OTHER"})
    compat.hide_environment(["AWS_SECRET_ACCESS_KEY"])
    assert {"OTHER"} == class_cache.ENV_VARS_TO_PROPAGATE


def test_run_knows_the_newest_steps() -> None:
    info = RunInfo("run", "1", "user", "RUNNING", 0, None, "active")
    assert compat.newest_steps(Run(info, RunData([Metric("loss", 0.5, 0, 7)]))) == {"loss": 7}


@pytest.mark.parametrize("workers", [1, 2])
def test_lean_trainer_starts_no_dataset_manager(workers: int) -> None:
    lean = compat.lean_trainer(workers)

    def kinds(trainer: type) -> set[type]:
        return {type(callback) for callback in trainer(lambda: None)._create_default_callbacks()}

    assert kinds(lean.__mro__[1]) - kinds(lean) == {DatasetsCallback}
    assert issubclass(lean, TorchTrainer) == (workers > 1)


def test_ray_takes_a_folder_for_its_files() -> None:
    """`init` names the arguments that it does not know, before it starts anything."""
    with pytest.raises(RuntimeError, match=r"nknown keyword argument\(s\): .*_unknown") as error:
        ray.init(address="local", _temp_dir="/nowhere", _unknown=True)
    assert "_temp_dir" not in str(error.value)
    assert not ray.is_initialized()
