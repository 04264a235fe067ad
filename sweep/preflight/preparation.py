"""The preparation of a sweep's trials, while worker groups start and trials run that need not wait for it.

first plan ─► trials that need nothing more start ─► for each forward pass: feature cache ─► its plan ─► its trials
"""

import time
from collections.abc import Callable
from pathlib import Path

from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.config.space import Values
from sweep.execution.cluster import Nodes
from sweep.execution.tasks import TaskQueue
from sweep.preflight.checks import building
from sweep.preflight.dry_run import dry_runs_on_workers
from sweep.preflight.feature_cache import Log, Precomputation, compute_on_workers
from sweep.preflight.plan import WORKER_STARTUP, Plan, format_estimate, make_plan
from sweep.preflight.plan_file import Estimate, save_actual_time, save_estimate
from sweep.search.candidates import resolve_candidate
from sweep.search.study import StudyStore

# Estimated seconds from which a trial is compiled: the layers of a 3B model took 81 s to compile on an H100, and a gain
# of a tenth brings that back in a quarter of an hour.
COMPILE_FROM = 900.0


class Preparation:
    """Computes the feature cache and makes the plan, and lets each trial start as soon as both are ready for it.

    Args:
        study: of the sweep; the plan decides what it draws.
        config: of the sweep.
        cache: folder of the cache.
        nodes: on which trials run.
        slots: trials at a time.
        left: trials that have not ended.
        say: shows a line to the user.
        ready: called before the first trial may start.
    """

    def __init__(
        self,
        study: StudyStore,
        config: ResolvedConfig,
        cache: Path,
        nodes: Nodes,
        slots: int,
        left: int,
        say: Log,
        ready: Callable[[], None],
    ) -> None:
        self.study, self.config, self.cache = study, config, cache
        self.nodes, self.slots, self.left = nodes, slots, left
        self.say, self.ready = say, ready
        self.estimate: Estimate | None = None
        self.estimated = 0.0  # when it was estimated
        self.spent = 0.0  # seconds of dry runs
        self.plan: Plan | None = None

    def run(self, queue: TaskQueue) -> None:
        """Prepare all trials.

        Args:
            queue: of tasks for worker groups; tells them which trials may start.

        Raises:
            UserError: no trial fits into memory, or the cache cannot be computed.
            ClusterError: the workers of a task died too often.
            QueueClosedError: the sweep ends.
        """
        compute = compute_on_workers(queue, self.slots)
        work = Precomputation(self.config, self.cache, self.say, self.left, compute)
        self._plan(queue, work, work.pending)
        self.ready()

        def waits(values: Values) -> bool:
            with building:
                trial = resolve_candidate(self.config, values)
                return trial is not None and self._awaits(work, trial, work.pending)

        queue.waits = waits
        queue.announce_change()
        for folders in work.steps():
            self._plan(queue, work, work.pending - folders)
            work.pending -= folders
            queue.announce_change()

    def save_actual_time(self) -> None:
        """Save what the trials took, which have all ended."""
        if self.estimate is not None:
            save_actual_time(self.study.folder, self.estimate, time.monotonic() - self.estimated)

    def decide(self, config: Config, values: Values) -> Config:
        """Return the configuration of a trial with what its dry run decides: where it says auto, and after the plan."""
        if self.plan is None:
            return config
        decided: Values = {}
        budget = self.plan.token_budget(values)
        if budget is not None and config.train.token_budget == "auto":
            decided["train.token_budget"] = budget
        if config.train.compile == "auto":
            seconds = self.plan.epoch_seconds(values) * config.train.epochs
            compiles = config.resources.device == "cuda" and not config.resources.shard and seconds >= COMPILE_FROM
            decided["train.compile"] = "on" if compiles else "off"
        return config.with_values(decided)

    def _awaits(self, work: Precomputation, trial: ResolvedConfig, pending: set[Path]) -> bool:
        """Return whether a trial must wait while some folders of the cache are not complete."""
        if 0 < self.config.resources.gpus_per_worker < 1:  # what runs on the same GPU would disturb a dry run
            return bool(pending)
        return work.awaits(trial, pending)

    def _plan(self, queue: TaskQueue, work: Precomputation, pending: set[Path]) -> None:
        """Make the plan of the trials that need not wait for some folders; estimate the time once it is complete."""
        plan: Plan = make_plan(
            self.config,
            self.cache,
            self.study.folder,
            self.nodes,
            self.slots,
            self.say,
            dry_runs_on_workers(queue),
            lambda trial: self._awaits(work, trial, pending),
            self.spent,
        )
        self.spent, self.plan = plan.seconds, plan
        self.study.fits = plan.fits  # the sampler does not draw what cannot fit into memory
        if not pending:
            startup = WORKER_STARTUP if queue.waits is None else 0.0
            self.estimate = plan.estimate(self.study.trials(), self.study.points_left(), self.slots, startup)
            self.estimated = time.monotonic()
            self.say(format_estimate(self.config, self.estimate, self.slots))
            save_estimate(self.study.folder, self.estimate)
