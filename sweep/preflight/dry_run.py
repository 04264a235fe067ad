"""Dry runs of trials: what a trial takes of time and memory, measured before the sweep starts, as the trial will run.

Small models run in this process. Others run on the cluster, in processes that may die of a lack of memory.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from data.errors import UserError, reason
from data.loading.cached_arrays import CacheFolders
from model.runtime import memory
from model.training.dry_run import TrialCost, measure
from sweep.config.resolve import ResolvedConfig
from sweep.execution.cluster import ClusterError
from sweep.execution.resources import worker_resources
from sweep.execution.trial import build

Seconds = Callable[[], float]
DRY_RUN_SECONDS = 1800.0  # until one of the dry runs ends, which may have to wait for a free place


class DryRunResult(BaseModel):
    """The result of a dry run: a cost, or why there is none. `plan.json` contains the aliases of what is set."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)
    cost: TrialCost | None = Field(None, alias="measured", description="What a worker of the trial takes.")
    startup: float = Field(0.0, alias="build", description="Seconds until the trial makes its first step.")
    capacity: int = Field(0, description="Memory of the device, in bytes.")
    too_large: str = Field("", alias="full", description="Why the trial does not fit into memory.")
    failure: str = Field("", alias="trouble", description="Why the trial could not run for another reason.")


class DryRun(NamedTuple):
    """A dry run to do."""

    config: ResolvedConfig  # of the trial
    cached: CacheFolders  # that the trial reads
    seconds: float = math.inf  # that its steps may take
    last: bool = False  # its process remains for other tasks, such as reading clips, and needs the models no more


def dry_run(run: DryRun) -> DryRunResult:
    """Do a dry run in this process."""
    try:
        return _dry_run(run)
    finally:
        if run.last:
            memory.forget_models()


def _dry_run(run: DryRun) -> DryRunResult:
    config, device, started = run.config, run.config.resources.device, time.monotonic()
    peak, capacity = memory.Peak(device), memory.capacity(device)
    try:
        model, data = build(config, "local", ("train", "val"), device, run.cached)
        startup = time.monotonic() - started
        cost = measure(
            model, data, config.train, config.tasks, config.seed, config.resources.workers, peak, run.seconds
        )
    except memory.OutOfMemoryError as error:
        return DryRunResult(too_large=reason(error))
    except UserError as error:  # a trial that is drawn fails with the same error
        return DryRunResult(failure=reason(error))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not memory.is_out_of_memory(error):
            raise
        return DryRunResult(too_large="out of memory before the first step")
    return DryRunResult(cost=cost, startup=startup, capacity=capacity)


def dry_runs_here(runs: Mapping[str, DryRun], seconds: Seconds, slots: int = 1) -> Iterator[tuple[str, DryRunResult]]:
    """Do the dry runs in this process, one after another; yield each result by its key.

    Args:
        runs: by key.
        seconds: that the steps of all runs that are left may take.
        slots: is not used.
    """
    for index, (key, run) in enumerate(runs.items()):
        yield key, dry_run(run._replace(seconds=seconds() / (len(runs) - index)))


def dry_runs_on_ray(runs: Mapping[str, DryRun], seconds: Seconds, slots: int) -> Iterator[tuple[str, DryRunResult]]:
    """Do the dry runs on nodes with the resources of a worker; yield each result by its key.

    Args:
        runs: by key.
        seconds: that the steps of all runs that are left may take.
        slots: runs at a time.

    Raises:
        ClusterError: the cluster is lost.
    """
    import ray

    died = []
    try:
        for key, result in _on_ray(runs, seconds, slots):
            if result is None:
                died.append(key)
            else:
                yield key, result
        for key in died:  # repeat it alone: another dry run may have taken its memory
            for _, result in _on_ray({key: runs[key]}, seconds, 1):
                yield key, result or DryRunResult(too_large="its dry run killed the process, also when run alone")
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the dry runs failed ({reason(error)}); rerun the same command to resume") from None


def _on_ray(runs: Mapping[str, DryRun], seconds: Seconds, slots: int) -> Iterator[tuple[str, DryRunResult | None]]:
    """Yield the results in the order in which they are ready; None for a process that died."""
    import ray

    waiting, left = {}, dict(runs)

    def start() -> None:
        """Start the next run; its share of the time is known only now."""
        rounds = math.ceil(len(left) / slots)
        key = next(iter(left))
        run = left.pop(key)._replace(seconds=seconds() / rounds, last=len(left) < slots)
        resources = worker_resources(run.config)
        # A GPU that trials share runs one dry run at a time: another one must not be the reason that memory is short.
        options = {"num_cpus": resources["CPU"], "num_gpus": math.ceil(resources.get("GPU", 0))}
        waiting[ray.remote(dry_run).options(max_retries=0, **options).remote(run)] = key

    while waiting or left:
        while left and len(waiting) < slots:
            start()
        finished, _ = ray.wait(list(waiting), timeout=DRY_RUN_SECONDS)
        if not finished:
            raise ClusterError(
                f"no dry run of a trial has ended within {DRY_RUN_SECONDS / 60:.0f} min: there is no free place, "
                "or a node hangs (`ray status` shows both); rerun the same command to resume"
            )
        [ready] = finished
        key = waiting.pop(ready)
        try:
            yield key, ray.get(ready)
        except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError):
            yield key, None
