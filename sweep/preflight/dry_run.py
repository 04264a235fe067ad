"""Dry runs of trials: what a trial takes of time and memory, measured before the sweep starts, as the trial will run.

Small models run in this process. Others run in the workers of the sweep, which may die of a lack of memory.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from data.errors import UserError, reason
from data.loading.cached_arrays import CacheFolders
from model.runtime import memory
from model.training.dry_run import TrialCost, measure
from model.training.memory_estimate import estimate_memory
from sweep.config.resolve import ResolvedConfig
from sweep.execution.tasks import TaskQueue
from sweep.execution.trial import build
from sweep.preflight.checks import building_in_turns

MEMORY_MARGIN = 0.1  # of a GPU's memory, that train.token_budget: auto leaves to longer steps and to fragments
Seconds = Callable[[], float]


class DryRunResult(BaseModel):
    """The result of a dry run: a cost, or why there is none. `plan.json` contains the aliases of what is set."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)
    cost: TrialCost | None = Field(None, alias="measured", description="What a worker of the trial takes.")
    startup: float = Field(0.0, alias="build", description="Seconds until the trial makes its first step.")
    seconds: float = Field(0.0, description="Seconds that the dry run took.")
    estimate: int = Field(0, description="Estimated bytes with one example at a time, of a trial without a dry run.")
    capacity: int = Field(0, description="Memory of the device, in bytes.")
    too_large: str = Field("", alias="full", description="Why the trial does not fit into memory.")
    failure: str = Field("", alias="trouble", description="Why the trial could not run for another reason.")


class DryRun(NamedTuple):
    """A dry run to do."""

    config: ResolvedConfig  # of the trial
    cached: CacheFolders  # that the trial reads
    seconds: float = math.inf  # that it may take


def dry_run(run: DryRun) -> DryRunResult:
    """Do a dry run in this process."""
    config, device, started = run.config, run.config.resources.device, time.monotonic()
    if config.resources.shard:
        return _estimated(run)
    peak, capacity = memory.Peak(device), memory.capacity(device)
    try:
        model, data = build(config, "local", ("train", "val"), device, run.cached)
        startup = time.monotonic() - started
        grows = config.train.token_budget == "auto" and device == "cuda"
        share = (1 - MEMORY_MARGIN) * min(1.0, config.resources.gpus_per_worker)
        cost = measure(
            model,
            data,
            config.train,
            config.tasks,
            config.seed,
            config.resources.workers,
            peak,
            run.seconds - startup,
            int(share * capacity) if grows else None,
        )
    except memory.OutOfMemoryError as error:
        return DryRunResult(too_large=reason(error))
    except UserError as error:  # a trial that is drawn fails with the same error
        return DryRunResult(failure=reason(error))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not memory.is_out_of_memory(error):
            raise
        return DryRunResult(too_large="out of memory before the first step")
    return DryRunResult(cost=cost, startup=startup, seconds=time.monotonic() - started, capacity=capacity)


def _estimated(run: DryRun) -> DryRunResult:
    """Return the estimated memory of a trial whose workers divide the LLM, while it computes its longest example."""
    config, device = run.config, run.config.resources.device
    try:
        plain = config.train.model_copy(update={"compile": "off"})
        model, data = build(config.model_copy(update={"train": plain}), "local", ("train",), "meta", run.cached)
        longest = max(cost.tokens for cost in data.splits["train"].costs)
        data.close()
        estimate = estimate_memory(model, model.llm, config.model, [longest], config.resources.workers).total
    except UserError as error:
        return DryRunResult(failure=reason(error))
    return DryRunResult(
        failure="resources.shard divides the LLM among workers, and a dry run has one; its memory is estimated",
        capacity=memory.capacity(device),
        estimate=estimate + (memory.WORKER if device == "cpu" else 0),
    )


DryRuns = Callable[[Mapping[str, DryRun], Seconds, int], Iterator[tuple[str, DryRunResult]]]


def dry_runs_here(runs: Mapping[str, DryRun], seconds: Seconds, slots: int = 1) -> Iterator[tuple[str, DryRunResult]]:
    """Do the dry runs in this process, one after another, as long as there is time; yield each result by its key.

    Args:
        runs: by key.
        seconds: that all runs that are left may take; the first one starts in any case.
        slots: is not used.
    """
    for index, (key, run) in enumerate(runs.items()):
        left = seconds()
        if index and not left:
            return
        with building_in_turns():
            result = dry_run(run._replace(seconds=left / (len(runs) - index)))
        yield key, result


def dry_runs_on_workers(queue: TaskQueue) -> DryRuns:
    """Return a function that does dry runs in the workers of a sweep; they leave their models there for trials.

    Args:
        queue: of the sweep.
    """

    def run(runs: Mapping[str, DryRun], seconds: Seconds, slots: int) -> Iterator[tuple[str, DryRunResult]]:
        died = []
        for key, result in _on_workers(queue, runs, seconds, slots):
            if result is None:
                died.append(key)
            else:
                yield key, result
        for key in died:  # repeat it alone: another dry run may have taken its memory
            for _, result in _on_workers(queue, {key: runs[key]}, seconds, 1):
                yield key, result or DryRunResult(too_large="its dry run killed the process, also when run alone")

    return run


def _on_workers(
    queue: TaskQueue, runs: Mapping[str, DryRun], seconds: Seconds, slots: int
) -> Iterator[tuple[str, DryRunResult | None]]:
    """Yield the results in the order in which they are ready; None for a process that died."""
    keys, waiting = list(runs), list(runs)

    def started(key: str) -> list[Callable[[], str]]:
        """Return the run as a task; its share of the time is known only when it starts. Without time it is empty."""
        left, rounds, is_first = seconds(), math.ceil(len(waiting) / slots), len(waiting) == len(keys)
        waiting.remove(key)
        return [functools.partial(_dry_run_text, runs[key]._replace(seconds=left / rounds))] if left or is_first else []

    # A GPU that trials share makes one dry run at a time: another one must not be the reason that memory is short.
    shared = any(0 < run.config.resources.gpus_per_worker < 1 for run in runs.values())
    offers = [functools.partial(started, key) for key in keys]
    for index, results in queue.run(offers, at_once=1 if shared else slots):
        if results != []:
            yield keys[index], None if results is None else DryRunResult.model_validate_json(results[0])


def _dry_run_text(run: DryRun) -> str:
    return dry_run(run).model_dump_json()
