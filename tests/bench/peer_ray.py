"""The stock stack that a whole sweep is compared with: Tune, OptunaSearch, ASHA, MLflow, and a TorchTrainer a trial.

    python -m tests.bench.peer_ray CONFIG.yaml FOLDER

Trains the points of a configuration, with the encoder online, and leaves FOLDER/results.json:
[{params, value, seconds}]. It is laid out as the manual of Ray 2.60 has it ("Hyperparameter Tuning with Ray Tune"), and
gets what makes it faster here: this project's model and training loop, the memory-mapped reader, checkpoints of only
what trains. ASHA's first rung is the last epoch, so that all trials train to their end.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What the actors around the workers would have to import is imported where it is used.
from sweep.config import schema as configuration
from sweep.config.files import load
from sweep.config.schema import Config


def sweep(config: Config, folder: Path) -> list[dict[str, Any]]:
    """The value of every point after its last epoch, and the seconds that it trained."""
    import ray.tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    search, epochs = config.search, config.train.epochs
    goal = {"metric": search.metric, "mode": search.direction[:3]}
    space = {key: axis.distribution() for key, axis in search.space.items()}
    with usual_ray():
        arguments = {"config": config.model_dump(mode="json"), "folder": str(folder)}
        tuner = ray.tune.Tuner(
            # The workers hold the CPUs: the actor of a trial waits for them.
            ray.tune.with_resources(ray.tune.with_parameters(trial, **arguments), {"CPU": 0, "memory": 1}),
            tune_config=ray.tune.TuneConfig(
                search_alg=OptunaSearch(space, points_to_evaluate=search.points, seed=config.seed, **goal),
                scheduler=ASHAScheduler(max_t=epochs, grace_period=epochs, reduction_factor=2, **goal),
                num_samples=search.trials,
                max_concurrent_trials=int(ray.cluster_resources()["CPU"] // config.resources.cpus_per_worker),
            ),
            run_config=ray.tune.RunConfig(
                name="tune",
                storage_path=str(folder),
                callbacks=[MLflowLoggerCallback(f"sqlite:///{folder}/mlflow.db", experiment_name=config.name)],
                verbose=0,
            ),
        )
        found = tuner.fit()
        assert not found.errors, found.errors[0]
        return [
            {"params": own.config, "value": own.metrics[search.metric], "seconds": own.metrics["seconds"]}
            for own in found
        ]


@contextlib.contextmanager
def usual_ray() -> Iterator[None]:
    """Ray as it is by default: Ray Train asks the dashboard whether a controller lives, and else keeps its CPUs."""
    import ray

    ray.init(address="local", dashboard_host="127.0.0.1", log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def trial(values: dict[str, Any], config: dict[str, Any], folder: str) -> None:
    """What Tune runs for a trial."""
    import ray.train
    import ray.tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        worker,
        train_loop_config={"config": config, "values": values},
        scaling_config=ray.train.ScalingConfig(resources_per_worker={"CPU": config["resources"]["cpus_per_worker"]}),
        run_config=ray.train.RunConfig(
            name=ray.tune.get_context().get_trial_id(),
            storage_path=f"{folder}/train",
            callbacks=[TuneReportCallback()],
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()


def worker(loop: dict[str, Any]) -> None:
    """What Train runs in a trial's worker."""
    import ray.train

    from model.checkpoints.checkpoint import FILE
    from sweep.execution.trial import run_trial

    config = configuration.parse(loop["config"], "stock").with_values(loop["values"])
    with tempfile.TemporaryDirectory() as name:
        folder, kept = Path(name) / "0", Path(name) / "kept"
        folder.mkdir()

        def report(epoch: int, metrics: dict[str, Any]) -> None:
            kept.mkdir(exist_ok=True)
            (kept / FILE).unlink(missing_ok=True)
            (kept / FILE).hardlink_to(folder / FILE)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(kept)))

        run_trial(config, folder, report, "local", config.resources.device)


if __name__ == "__main__":
    made = Path(sys.argv[2])
    made.mkdir(parents=True, exist_ok=True)
    (made / "results.json").write_text(json.dumps(sweep(load(sys.argv[1]), made)))
