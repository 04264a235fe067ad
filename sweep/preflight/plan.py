"""The plan of a sweep: dry runs of its trial profiles show which trials cannot fit and how long the sweep will take.

search space ─► trial profiles ─► dry runs ─► plan.json ─► excluded trials, estimated time; at the end, actual time
"""

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from data.errors import UserError
from data.formats import format_bytes, format_count, format_duration
from model.runtime import memory
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.config.version import code_version
from sweep.execution.cluster import Nodes, count_slots, memory_share
from sweep.execution.trial import open_shards
from sweep.preflight.checks import building, skeleton
from sweep.preflight.dry_run import DryRun, DryRunResult, DryRuns, dry_runs_here
from sweep.preflight.eta import Values, eta, remaining_work, seconds_left
from sweep.preflight.feature_cache import cache_requests, cached_folders
from sweep.preflight.plan_file import Estimate, PlanFile
from sweep.preflight.trial_profiles import TrialProfile, matching_profiles, trial_profiles
from sweep.search.cost import device_seconds, format_device_hours
from sweep.search.stopping import total_trials
from sweep.search.study import StudyStore, TrialRecord
from sweep.search.study_storage import has_study

SMALL_MODEL = 20 * 10**6  # parameters: a separate process would take longer to start than its dry run takes
SHARE, LEAST_SECONDS = 0.05, 10.0  # of the sweep's estimated time that dry runs may take, and seconds in any case
WORKER_STARTUP = 20.0  # seconds until the workers of a worker group are up
Log = Callable[[str], None]


@dataclass(frozen=True)
class ProfileResult:
    """A trial profile, and the result of its dry run."""

    profile: TrialProfile
    result: DryRunResult
    available: int  # bytes that a worker may use
    too_large: str  # why its trials do not fit into memory; empty if they do, or if that is unknown

    @property
    def fits(self) -> bool:
        """Return whether its trials may start: only those that were seen not to fit may not."""
        return not self.too_large

    @property
    def epoch_seconds(self) -> float:
        """Return the seconds of an epoch with its evaluation; 0 if they are unknown."""
        cost = self.result.cost
        return 0.0 if cost is None else cost.train_seconds + cost.val_seconds

    def note(self) -> str | None:
        """Return what a user should know about it, if anything."""
        cost, failure = self.result.cost, self.result.failure
        if failure:
            return f"{self.profile}: could not be measured ({failure})"
        if cost and cost.token_budget != (budget := self.profile.config.train.initial_token_budget):
            if self.profile.config.train.token_budget == "auto":
                return f"{self.profile}: train.token_budget auto is {cost.token_budget}"
            if cost.token_budget < budget:
                fit = f"{cost.token_budget} tokens fit into memory at once"
                return f"{self.profile}: {fit}, fewer than train.token_budget"
        if cost and cost.full_bytes > self.available:
            return (
                f"{self.profile}: needs {format_bytes(cost.full_bytes)} for train.token_budget at once, and has "
                f"{format_bytes(self.available)}; lower train.token_budget"
            )
        return None


@dataclass(frozen=True)
class Plan:
    """What the dry runs show about a sweep."""

    config: Config
    results: list[ProfileResult]
    untested: int  # the number of profiles without a dry run
    waiting: int = 0  # the number of profiles whose dry run waits for the feature cache
    seconds: float = 0.0  # that the dry runs have taken

    def fits(self, values: Values) -> bool:
        """Return whether a trial with these values may start: not if all its profiles are too large."""
        matching = self._matching(values)
        return not matching or any(result.fits for result in matching)

    def token_budget(self, values: Values) -> int | None:
        """Return the token budget that the dry runs found for a trial with these values; None: it was not measured."""
        costs = [result.result.cost for result in self._matching(values)]
        return min((cost.token_budget for cost in costs if cost is not None), default=None)

    def _matching(self, values: Values) -> list[ProfileResult]:
        indices = matching_profiles(values, [result.profile.values for result in self.results])
        return [self.results[index] for index in indices]

    def excluded(self) -> list[str]:
        """Return a line for each profile that does not fit into memory."""
        return [
            f"excluded, does not fit into memory: {result.profile}: {result.too_large}"
            for result in self.results
            if not result.fits
        ]

    def notes(self) -> Iterator[str]:
        """Yield a line for everything else that a user should know."""
        yield from filter(None, (result.note() for result in self.results))
        if extrapolated := sum(
            result.result.cost is not None and result.result.cost.extrapolated for result in self.results
        ):
            profiles = format_count(extrapolated, "trial profile")
            yield f"{profiles} measured in part: the time of an epoch is extrapolated"
        if self.untested:
            profiles = format_count(self.untested, "more trial profile")
            yield f"{profiles} not measured: none is excluded, and the mean time is assumed"
        if self.waiting:
            verb = "waits" if self.waiting == 1 else "wait"
            yield f"{format_count(self.waiting, 'trial profile')} {verb} for the feature cache"

    def epoch_seconds(self, values: Values | None = None) -> float:
        """Return the seconds of an epoch of a trial with these values, or of the mean trial."""
        measured = [result for result in self.results if result.fits and result.result.cost]
        matching = [] if values is None else [result for result in self._matching(values) if result in measured]
        results = matching or measured
        weight = sum(result.profile.weight for result in results) or 1
        return sum(result.epoch_seconds * result.profile.weight for result in results) / weight

    def estimate(
        self,
        trials: Sequence[TrialRecord],
        points: Sequence[Values],
        slots: int,
        worker_startup: float = WORKER_STARTUP,
    ) -> Estimate:
        """Return what the remaining trials will take.

        Args:
            trials: of the study.
            points: that no trial has used yet.
            slots: trials at a time.
            worker_startup: seconds until the first trials can start.
        """
        search, epochs = self.config.search, self.config.train.epochs
        new_epochs = search.mean_epochs(epochs) * search.expected_share(epochs, search.trials)
        work = remaining_work(self.config, trials, points, new_epochs, self.epoch_seconds)
        startup = statistics.median([result.result.startup for result in self.results]) if self.results else 0.0
        seconds = eta(work, slots, worker_startup, startup, seconds_left(self.config, trials))
        return Estimate(trials=search.trials, used=device_seconds(trials), work=sum(work), seconds=seconds)


def format_estimate(config: Config, estimate: Estimate, slots: int) -> str:
    """Return an estimate as a line."""
    at_once = f"{format_count(slots, 'trial')} at a time"
    hours = format_device_hours(config, estimate.work)
    return f"plan: about {format_duration(estimate.seconds)} ({at_once}), {hours}"


def make_plan(
    config: ResolvedConfig,
    cache: Path,
    folder: Path | None,
    nodes: Nodes,
    slots: int,
    log: Log,
    dry_runs: DryRuns = dry_runs_here,
    waits: Callable[[ResolvedConfig], bool] = lambda trial: False,
    spent: float = 0.0,
) -> Plan:
    """Do the dry runs of the trial profiles, except for those with a saved result, as long as there is time.

    Args:
        config: of the sweep.
        cache: the feature cache.
        folder: of the sweep, where the results are saved; None: write nothing.
        nodes: on which trials run.
        slots: trials at a time.
        log: shows a line to the user.
        dry_runs: does the dry runs of models that are too large for this process.
        waits: returns whether the dry run of a trial must wait, because its part of the feature cache is not complete.
        spent: seconds that dry runs of this run of the sweep have taken before.

    Raises:
        UserError: no profile fits into memory.
    """
    new = list[float]()  # seconds of the dry runs

    def measured(all_values: bool) -> Plan:
        profiles, untested = trial_profiles(config, all_values)
        ready = [profile for profile in profiles if not waits(profile.config)]
        results = _profile_results(config, ready, cache, folder, nodes, slots, dry_runs, spent, new)
        untested += len(ready) - len(results)
        return Plan(config, results, untested, len(profiles) - len(ready), spent + sum(new))

    plan = measured(all_values=False)
    if not all(result.fits for result in plan.results):  # values between the smallest and the largest one may fit
        plan = measured(all_values=True)
    excluded = plan.excluded()
    if folder is not None:
        file = PlanFile.read(folder)
        file.excluded = excluded
        file.write(folder)
    results = plan.results
    if new:
        log(f"plan: measured {format_count(len(new), 'trial profile')} in {sum(new):.1f} s")
    if len(results) > len(new):
        log(f"plan: {format_count(len(results) - len(new), 'trial profile')} measured before")
    for line in [*excluded, *plan.notes()]:
        log(f"plan: {line}")
    if results and len(excluded) == len(results) and not plan.untested and not plan.waiting:
        raise UserError(f"no trial of the search space fits into memory ({results[0].too_large}); {memory.ADVICE}")
    return plan


def preview_plan(config: ResolvedConfig, cache: Path, folder: Path) -> list[str]:
    """Return the plan as lines, without Ray and without writing anything; for large models, without dry runs.

    Raises:
        UserError: no profile fits into memory.
    """
    profiles, _ = trial_profiles(config)
    if not is_small(profiles):
        return [f"plan: the sweep measures {format_count(len(profiles), 'trial profile')} before its first trial"]
    trials, points = list[TrialRecord](), config.search.points
    if has_study(folder, config):
        study = StudyStore.read(folder, config)
        trials, points = study.trials(), study.points_left()
    left = total_trials(config, trials) - sum(trial.has_ended for trial in trials)
    nodes, lines = [{"CPU": float(os.cpu_count() or 1)}], list[str]()
    slots = count_slots(config, nodes, left)
    plan = make_plan(config, cache, None, nodes, slots, lines.append)
    line = format_estimate(config, plan.estimate(trials, points, slots), slots)
    incomplete = any(request.missing for request, _ in cache_requests(config, cache))
    return [*lines, f"{line}; less with the feature cache" if incomplete else line]


def is_small(profiles: Iterable[TrialProfile]) -> bool:
    """Return whether the dry runs of these profiles are done in this process."""
    configs = {
        profile.config.model.llm.path + profile.config.model.encoder_path: profile.config for profile in profiles
    }
    sizes = [sum(parameter.numel() for parameter in skeleton(config).parameters()) for config in configs.values()]
    on_cpu = all(config.resources.device == "cpu" for config in configs.values())
    return on_cpu and max(sizes, default=0) <= SMALL_MODEL


def _profile_results(
    config: ResolvedConfig,
    profiles: Sequence[TrialProfile],
    cache: Path,
    folder: Path | None,
    nodes: Nodes,
    slots: int,
    dry_runs: DryRuns,
    spent: float,
    taken: list[float],
) -> list[ProfileResult]:
    """Return the results of the profiles that there is time for; each new one is saved as soon as it is known.

    Args:
        spent: see `make_plan`.
        taken: gets the seconds of each new dry run, divided by the number of those that ran at the same time.
    """
    runs = [DryRun(profile.config, cached_folders(profile.config, cache)) for profile in profiles]
    keys = [_key(run, nodes) for run in runs]
    file = PlanFile() if folder is None else PlanFile.read(folder)
    results: dict[str, DryRunResult] = {}
    for key, content in file.steps.items():
        try:
            results[key] = DryRunResult.model_validate(content)
        except ValidationError:
            continue  # damaged: measure again
    new = {key: run for key, run in zip(keys, runs, strict=True) if key not in results}
    if len(new) > 1:  # what needs most memory comes first, in case that there is no time for all
        new = dict(sorted(new.items(), key=lambda item: _demand(item[1].config), reverse=True))
    at_once = slots
    if dry_runs is dry_runs_here or (new and is_small(profiles)):
        dry_runs, at_once = dry_runs_here, 1

    def seconds() -> float:
        """Return the seconds that dry runs may still take: a share of the sweep, as far as its time is known."""
        known = [(profile, results[key]) for profile, key in zip(profiles, keys, strict=True) if key in results]
        plan = Plan(config, [_profile_result(profile, result, nodes, slots) for profile, result in known], 0)
        allowed = max(LEAST_SECONDS, SHARE * plan.estimate([], config.search.points, slots).seconds)
        return max(0.0, allowed - spent - sum(taken))

    for key, result in dry_runs(new, seconds, slots):
        results[key] = result
        taken.append(result.seconds / at_once)
        if folder is not None:
            file.steps = file.steps | {key: result.model_dump(mode="json", by_alias=True, exclude_defaults=True)}
            file.write(folder)
    known = [(profile, results[key]) for profile, key in zip(profiles, keys, strict=True) if key in results]
    return [_profile_result(profile, result, nodes, slots) for profile, result in known]


def _demand(config: ResolvedConfig) -> tuple[int, ...]:
    """Return what the memory of a trial grows with: parameters that train, and the length of examples."""
    with building:
        parameters = skeleton(config).parameters()
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained, config.data.history, config.model.llm.max_text_tokens, config.model.uses_audio


def _profile_result(profile: TrialProfile, result: DryRunResult, nodes: Nodes, slots: int) -> ProfileResult:
    """Compare what a dry run needed with what a worker may use, now that the number of worker groups is known."""
    available = int(result.capacity * memory_share(profile.config, nodes, slots))
    too_large = result.too_large
    needed = result.cost.min_bytes if result.cost else result.estimate
    if needed > available:
        too_large = f"needs {format_bytes(needed)} with one example at a time, and has {format_bytes(available)}"
    return ProfileResult(profile, result, available, too_large)


def _key(run: DryRun, nodes: Nodes) -> str:
    """Return a hash of everything that the result of a dry run depends on."""
    config = run.config

    def permanent(node: Mapping[str, float]) -> list[tuple[str, float]]:
        """Return the resources that do not change from day to day, as free memory does."""
        return sorted((name, n) for name, n in node.items() if name in ("CPU", "GPU") or name.startswith("accelerator"))

    kinds = sorted({repr(permanent(node)) for node in nodes})
    trial = config.model_dump(mode="json", exclude={"name": True, "search": True, "storage": True, "seed": True})
    cached = sorted(map(bool, run.cached))
    content = [trial, cached, kinds, open_shards(config).fingerprint, code_version()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
