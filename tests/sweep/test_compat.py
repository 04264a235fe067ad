"""The private interfaces in `sweep/compat.py` exist and still behave as the sweep expects."""

import inspect
import time
from pathlib import Path
from unittest.mock import Mock

import optuna
import pytest
import ray
from mlflow.entities import Metric, Run, RunData, RunInfo
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState, create_trial
from ray._private import auto_init_hook, parameter, services
from ray._private.state import GlobalState
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback, placement_group_callback
from ray.train.v2._internal.execution.controller import placement_group_cleaner
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


def test_ray_finds_no_raylet_that_is_hidden(tmp_path: Path) -> None:
    program = services.RAYLET_EXECUTABLE
    undo = compat.hide_raylet(tmp_path)
    assert not services._is_raylet_process([services.RAYLET_EXECUTABLE])
    assert Path(services.RAYLET_EXECUTABLE).resolve() == Path(program).resolve()
    undo()
    assert services._is_raylet_process([services.RAYLET_EXECUTABLE])


def test_ray_does_not_connect_by_itself_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda: pytest.fail("Ray has connected"))
    compat.never_connect_again()
    with pytest.raises(Exception, match=r"ray.init|not been started"):
        ray.put(1)


def test_ray_token_and_automatic_address_are_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.forget_ray_token()
    monkeypatch.setattr(services, "_find_address_from_flag", lambda flag: set())
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert compat.find_ray_cluster() is None
    monkeypatch.setattr(services, "_find_address_from_flag", lambda flag: {"10.0.0.1:6379"})
    assert compat.find_ray_cluster() == "10.0.0.1:6379"


def test_mlflow_tries_a_database_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.db import utils

    monkeypatch.setattr(utils, "MAX_RETRY_COUNT", utils.MAX_RETRY_COUNT)
    monkeypatch.setattr(utils, "create_sqlalchemy_engine", lambda uri: None)
    monkeypatch.setattr(utils.time, "sleep", (waited := list[float]()).append)
    compat.limit_database_retries(4)
    with pytest.raises(Exception, match="NoneType"):
        utils.create_sqlalchemy_engine_with_retry("postgresql://host/db")
    assert len(waited) == 3


def test_tune_gives_its_actors_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {"AWS_SECRET_ACCESS_KEY"})
    monkeypatch.setattr(class_cache, "DEFAULT_ENV_VARS", {"OTHER": "1"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    compat.share_environment()
    assert class_cache._ActorClassCache().get(type("Group", (), {}))._default_options["runtime_env"] == {}


def test_run_knows_the_newest_steps() -> None:
    info = RunInfo("run", "1", "user", "RUNNING", 0, None, "active")
    assert compat.newest_steps(Run(info, RunData([Metric("loss", 0.5, 0, 7)]))) == {"loss": 7}


def test_lean_trainer_has_no_dataset_manager_and_its_own_cleaner() -> None:
    lean = compat.lean_trainer()

    def kinds(trainer: type) -> set[type]:
        return {type(callback) for callback in trainer(lambda: None)._create_default_callbacks()}

    usual = placement_group_callback.PlacementGroupCleanerCallback
    assert kinds(lean.__mro__[1]) - kinds(lean) == {DatasetsCallback, usual}
    [own] = kinds(lean) - kinds(lean.__mro__[1])
    assert issubclass(own, usual)
    assert issubclass(lean, TorchTrainer)


def test_cleaner_asks_the_control_plane_for_its_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's asks the dashboard, which a local cluster does not have, so CPUs of a killed controller stayed taken."""
    started: list[type] = []
    monkeypatch.setattr(placement_group_callback.ray, "remote", lambda **_: lambda kind: started.append(kind) or Mock())
    monkeypatch.setattr(placement_group_callback.ray.runtime_context, "get_runtime_context", Mock())
    for module, name in (
        (placement_group_callback, "PlacementGroupCleaner"),
        (placement_group_cleaner, "is_actor_alive"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # which the processes of a group replace
    callbacks = compat.lean_trainer()(lambda: None)._create_default_callbacks()
    usual = placement_group_callback.PlacementGroupCleanerCallback
    next(each for each in callbacks if isinstance(each, usual)).after_controller_start(Mock())
    [kind] = started
    states = [{"State": "ALIVE"}, ConnectionError("the control plane is away"), {"State": "DEAD"}]
    monkeypatch.setattr(ray._private.state, "actors", Mock(side_effect=states))
    monkeypatch.setattr(placement_group_cleaner, "remove_placement_group", removed := Mock())
    monkeypatch.setattr(ray.util, "placement_group_table", lambda _: {"state": "CREATED"})
    monkeypatch.setattr(ray.actor, "exit_actor", exited := Mock())
    cleaner = kind("controller", check_interval_s=0.0, get_actor_timeout_s=1.0, stop_timeout=1.0)
    cleaner.register_placement_group(group := Mock())
    cleaner.start_monitoring()
    for _ in range(500):
        if exited.called:
            break
        time.sleep(0.01)
    removed.assert_called_once_with(group)
    assert ray._private.state.actors.call_count == 3


def test_ray_takes_a_folder_for_its_files() -> None:
    """`init` names the arguments that it does not know, before it starts anything."""
    with pytest.raises(RuntimeError, match=r"nknown keyword argument\(s\): .*_unknown") as error:
        ray.init(address="local", _temp_dir="/nowhere", _unknown=True)
    assert "_temp_dir" not in str(error.value)
    assert not ray.is_initialized()


def test_local_ray_starts_no_monitors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[parameter.RayParams] = []
    monkeypatch.setattr(ray, "init", lambda **options: made.append(parameter.RayParams()))
    usual = parameter.RayParams()
    assert (usual.no_monitor, "include_log_monitor" in vars(usual)) == (False, True)
    compat.init_local_ray(tmp_path)
    assert [(each.no_monitor, each.include_log_monitor) for each in made] == [(True, False)]
    assert type(usual) is parameter.RayParams, "for other programs of this process, nothing changes"
