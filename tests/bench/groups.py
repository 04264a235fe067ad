"""What a worker group of one worker costs to start: with a plain actor, and with Ray Train's public TorchTrainer.

A start covers the Tune actor, the mailbox, what Ray Train adds, and the worker with the imports of a trial.
"""

import tempfile
from collections.abc import Callable
from typing import Any

from sweep.execution.cluster import local_or_remote_ray
from sweep.execution.job import TrialJob
from tests.bench.measure import Cost, Row
from tests.bench.slots import watched

ROUNDS = 4
SAVED = 2.0  # CPU-seconds of a worker group that justify a private interface


def run(rounds: int = ROUNDS) -> list[Row]:
    """Start one group of each kind in every round; the first round warms the caches and is not counted."""
    taken: dict[str, list[Cost]] = {"lean": [], "public": []}
    with tempfile.TemporaryDirectory() as storage, local_or_remote_ray():
        for number in range(rounds + 1):
            for kind in sorted(taken, reverse=bool(number % 2)):
                cost = watched(lambda kind=kind: start(kind, storage))
                if number:
                    taken[kind].append(cost)
    pairs = list(zip(taken["lean"], taken["public"], strict=True))
    note = "; ".join(f"{lean.cpu:.1f} against {public.cpu:.1f} s" for lean, public in pairs)
    saved = [public.cpu - lean.cpu for lean, public in pairs]
    return [
        Row("worker group, CPU", "TorchTrainer", [lean.cpu / public.cpu for lean, public in pairs], note=note),
        Row("worker group, CPU saved", "seconds", saved, SAVED),
    ]


def start(kind: str, storage: str) -> None:
    """Start a worker group, run an empty trial in it, and end it."""
    import ray

    from sweep.execution.worker_group import worker_group_class

    scaling = {"num_workers": 1, "use_gpu": False, "resources_per_worker": {"CPU": 1}}
    group = worker_group_class("tests.bench.groups:fit", scaling, storage, "events")
    if kind == "public":
        group.run_workers = run_with_ray_train
    actor = ray.remote(num_cpus=0)(group).remote(config={"job": TrialJob("", "", "local", (), None)})
    assert ray.get(actor.train.remote())["finished"]
    ray.get(actor.stop.remote())
    ray.kill(actor)


def run_with_ray_train(group: Any) -> None:
    """Run the workers of a group with the public trainer."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from sweep.execution.worker_group import serve_together

    TorchTrainer(
        serve_together,
        train_loop_config={"mailbox": group.mailbox, "fit": group.fit},
        scaling_config=ray.train.ScalingConfig(**group.scaling),
        run_config=ray.train.RunConfig(storage_path=group.storage),
    ).fit()


def fit(job: TrialJob, report: Callable[..., None], interrupted: Callable[[], bool]) -> bool:
    """Import what a trial imports, and end."""
    import sweep.execution.trial  # noqa: F401

    return True
