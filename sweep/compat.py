"""Private interfaces of Ray, Optuna and MLflow that the sweep relies on, collected in one place.

Each function names the version it was checked against. `tests/sweep/test_compat.py` fails when one disappears; then
look for a public replacement first. Imports are inside the functions, so that a command loads only what it uses.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Run
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import QMCSampler
    from optuna.trial import FrozenTrial, Trial
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.callback import RayTrainCallback

FIXED_PARAMS = "fixed_params"  # system attribute in which optuna 5.0.0 stores the values of an enqueued trial
CREATE_STUDY = 0  # `JournalOperation.CREATE_STUDY` of optuna 5.0.0: the `op_code` of a journal's first line
HIDDEN_RAYLET = "sweep-node"  # name of the program in a scratch folder, without "raylet"
VERSION_TABLE = "version_info"  # table that `RDBStorage` of optuna 5.0.0 creates in every database


def writable_trial(study: "Study", frozen: "FrozenTrial") -> "Trial":
    """Return a running trial of a study for writing; optuna 5.0.0 has no public way from its number to a `Trial`."""
    from optuna.trial import Trial

    return Trial(study, frozen._trial_id)


def quasi_random_sampler(space: "Mapping[str, BaseDistribution]", seed: int, first: int) -> "QMCSampler":
    """Return Optuna's scrambled Sobol sequence over some axes from its point `first` on.

    `QMCSampler` of optuna 5.0.0 counts its points in the study and spans the axes of the first trial. A study in memory
    that is made for each draw has no count, and with conditions the first trial lacks axes.
    """
    from itertools import count

    from optuna.samplers import QMCSampler

    points = count(first)

    class QuasiRandomSampler(QMCSampler):
        def infer_relative_search_space(self, *_: object) -> "dict[str, BaseDistribution]":
            return {key: axis for key, axis in space.items() if not axis.single()}

        def _find_sample_id(self, *_: object) -> int:
            return next(points)

    return QuasiRandomSampler(scramble=True, seed=seed, warn_independent_sampling=False)


def init_local_ray(scratch: Path, **options: object) -> None:
    """Start Ray on this machine with its files in a folder; `_temp_dir` of ray 2.60.0 has no public name.

    Processes are left out that `ray.init` always starts: the log monitor, which reads what `log_to_driver=False` does
    not show, the monitor of the autoscaler, which has no node to add, and the dashboard with its HTTP API, which only
    this process could use. They take 5 CPU-seconds to start.
    """
    import ray
    from ray._private import parameter, services

    original, api_server = parameter.RayParams, services.start_api_server

    class LeanParams(original):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object, **named: object) -> None:
            super().__init__(*args, **named)
            self.no_monitor, self.include_log_monitor = True, False

    parameter.RayParams, services.start_api_server = LeanParams, lambda *args, **named: ("", None)
    try:
        ray.init(address="local", _temp_dir=str(scratch), **options)
    finally:
        parameter.RayParams, services.start_api_server = original, api_server


def hide_raylet(scratch: Path) -> Callable[[], None]:
    """Let Ray start its raylet under another name, and return a function that undoes it.

    The address `auto` of ray 2.60.0 connects to any raylet among the processes of a user. It knows one by the name of
    the program, so `ray.init("auto")` of another program would join a cluster that belongs to a sweep, and end with it.
    """
    from ray._private import services

    program, link = services.RAYLET_EXECUTABLE, scratch / HIDDEN_RAYLET
    link.symlink_to(program)
    services.RAYLET_EXECUTABLE = str(link)

    def undo() -> None:
        services.RAYLET_EXECUTABLE = program

    return undo


def forget_ray_token() -> None:
    """Let Ray read its token again; ray 2.60.0 keeps the first one for the life of a process."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()


def never_connect_again() -> None:
    """Keep Ray from connecting at its next call, as ray 2.60.0 does where it is not connected.

    A call that still hangs in a thread when the cluster is lost would otherwise connect to it, which holds the whole
    process for a minute and ends it with code 1.
    """
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False


def find_ray_cluster() -> str | None:
    """Return the address that `auto` stands for, which ray 2.60.0 looks up in a file and among the processes."""
    from ray._private import services

    services.find_gcs_addresses.cache_clear()
    try:
        return str(services.get_ray_address_from_environment("auto", None))
    except ConnectionError:
        return None


def lean_trainer() -> "type[TorchTrainer]":
    """Return Ray Train's trainer with two other callbacks (ray 2.60.0).

    - There is no manager of datasets, as a trial opens its own.
    - The process that frees the CPUs of a group whose controller was killed asks the control plane whether it lives.
      Ray's asks the dashboard, which a local cluster does not have, and the next group would wait without end.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback, placement_group_callback
    from ray.train.v2._internal.execution.controller import placement_group_cleaner

    class Cleaner(placement_group_cleaner.PlacementGroupCleaner):
        def start_monitoring(self) -> bool:
            placement_group_cleaner.is_actor_alive = is_actor_alive
            return bool(super().start_monitoring())

    class CleanerCallback(placement_group_callback.PlacementGroupCleanerCallback):
        def after_controller_start(self, train_run_context: object) -> None:
            placement_group_callback.PlacementGroupCleaner = Cleaner
            super().after_controller_start(train_run_context)

    class LeanTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> "list[RayTrainCallback]":
            own = (DatasetsCallback, placement_group_callback.PlacementGroupCleanerCallback)
            callbacks = super()._create_default_callbacks()
            return [*(callback for callback in callbacks if not isinstance(callback, own)), CleanerCallback()]

    return LeanTrainer


def is_actor_alive(actor_id: str, timeout: float) -> bool:
    """Return whether an actor lives, or whether that cannot be known now; ray 2.60.0 has no public call without a
    dashboard."""
    import ray

    try:
        found = ray._private.state.actors(actor_id)
    except Exception:  # the control plane is away for a moment
        return True
    return bool(found) and found["State"] != "DEAD"


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that will leave the cluster; ray 2.60.0 has no public call for it."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def store_value(key: str, value: bytes) -> None:
    """Store a value in the control plane of the cluster, in memory; ray 2.60.0 has no public call for it."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, value)


def read_value(key: str) -> bytes | None:
    """Return a value from the control plane; see `store_value`."""
    from ray.experimental import internal_kv

    value: bytes | None = internal_kv._internal_kv_get(key)
    return value


def forget_value(key: str) -> None:
    """Remove a value from the control plane; see `store_value`."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key)


def share_environment() -> None:
    """Keep Tune from giving its actors environment variables of their own (ray 2.60.0).

    They inherit what they need. Any user of the cluster can read the description of an actor, and Tune's list contains
    AWS's secrets; and an actor with its own environment cannot use a process that Ray has started in advance.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.clear()
    class_cache.DEFAULT_ENV_VARS.clear()


def set_default_artifact_root(folder: Path) -> None:
    """Name the folder for artifacts of MLflow's default experiment, which the sweep does not use (mlflow 3.17.2).

    MLflow writes it into a new database by an SQL text without parameters. By default it lies in the working directory,
    and a name with both kinds of quotes, or a colon, breaks that text; a URI has no such characters.
    """
    os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", folder.as_uri())


def limit_database_retries(attempts: int) -> None:
    """Let MLflow try that often to connect to a database; mlflow 3.17.2 has no setting for it."""
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = attempts


def newest_steps(run: "Run") -> dict[str, int]:
    """Return the step of the newest point of each metric of a run; `run.data.metrics` of mlflow 3.17.2 has no steps."""
    return {metric.key: int(metric.step) for metric in run.data._metric_objs}
