"""The estimated time that the remaining trials of a sweep take."""

import heapq
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from data.formats import format_duration
from sweep.config.schema import Config
from sweep.config.space import Value
from sweep.search.cost import device_hours, full_epochs, horizon, spent
from sweep.search.stopping import total_trials
from sweep.search.study import TrialRecord

Values = Mapping[str, Value]


def remaining_work(
    config: Config,
    trials: Sequence[TrialRecord],
    points: Sequence[Values],
    new_epochs: float,
    epoch_seconds: Callable[[Values | None], float],
) -> list[float]:
    """Return the seconds of training that each running trial and each trial to come within the budget still needs.

    How many steps an epoch has is known from the trials that have reported one; until then, `search.budget.steps` is no
    limit. What `search.budget.hours` leaves out depends on when trials start, see `eta`.

    Args:
        config: of the sweep.
        trials: of the study.
        points: the values of the trials that start next.
        new_epochs: the expected number of epochs of a trial that has not started.
        epoch_seconds: the seconds of an epoch by the values of a trial; None: of a trial with unknown values.
    """
    running = [
        epoch_seconds(trial.params) * _epochs_left(config, trial)
        for trial in trials
        if trial.state == "RUNNING"  # how far a paused one will continue is unknown
    ]
    new = max(0, total_trials(config, trials) - len(trials))
    values = [*points[:new], *[None] * (new - len(points[:new]))]
    work = [epoch_seconds(value) * new_epochs for value in values]
    return [*running, *_within_budget(config, trials, running, work, new_epochs)]


def _epochs_left(config: Config, trial: TrialRecord) -> float:
    """Return the epochs that a running trial still trains for, as epochs on the whole training split."""
    return full_epochs(config, range(len(trial.curve) + 1, horizon(config, trial.params) + 1))


def _within_budget(
    config: Config, trials: Sequence[TrialRecord], running: Sequence[float], new: Sequence[float], new_epochs: float
) -> Sequence[float]:
    """Return the first of some new trials, those that start before the budget is spent; see `remaining_work`."""
    if config.search.budget is None:
        return new
    limits, used = config.search.budget.limits(), spent(config, trials)
    paces = [trial.steps / full_epochs(config, trial.curve) for trial in trials if trial.curve]
    steps = statistics.median(paces) if paces else 0.0
    epochs = [_epochs_left(config, trial) for trial in trials if trial.state == "RUNNING"]
    used["gpu_hours"] += device_hours(config, sum(running))
    used["trials"] += sum(epochs) / config.train.epochs
    used["steps"] += steps * sum(epochs)
    each = {"trials": new_epochs / config.search.mean_epochs(config.train.epochs), "steps": steps * new_epochs}
    for count, seconds in enumerate(new):
        if any(used[name] >= limit for name, limit in limits.items() if name != "hours"):
            return new[:count]
        for name, amount in {**each, "gpu_hours": device_hours(config, seconds)}.items():
            used[name] += amount
    return new


def seconds_left(config: Config, trials: Sequence[TrialRecord]) -> float:
    """Return the seconds until `search.budget.hours` is spent; infinite without such a limit."""
    limit = config.search.budget.hours if config.search.budget else None
    return math.inf if limit is None else 3600 * max(0.0, limit - spent(config, trials)["hours"])


def eta(
    work: Sequence[float], slots: int, startup: float = 0.0, trial_startup: float = 0.0, last_start: float = math.inf
) -> float:
    """Return the seconds until the last trial ends, if each worker group takes the next trial as soon as it is free.

    Args:
        work: the seconds of each trial, in the order in which they start.
        slots: trials at a time.
        startup: seconds until a worker group can start its first trial.
        trial_startup: seconds from the start of a trial to its first step.
        last_start: seconds after which no trial starts.
    """
    ends = [startup] * max(1, min(slots, len(work)))
    for seconds in work:
        if ends[0] - startup >= last_start:
            break
        heapq.heapreplace(ends, ends[0] + trial_startup + seconds)
    return max(ends)


def observed_eta(config: Config, trials: Sequence[TrialRecord], slots: int) -> float | None:
    """Return the seconds until the last trial ends, estimated from the epochs that trials have finished.

    Returns:
        None before the first epoch, and if no trial is left.
    """
    paces = [
        trial.metrics["seconds"] / full_epochs(config, trial.curve)
        for trial in trials
        if trial.curve and "seconds" in trial.metrics
    ]
    if not paces:
        return None
    pace = float(statistics.median(paces))
    # New trials are expected to end as early as those before them, because pruning ends many of them.
    ended = [full_epochs(config, trial.curve) for trial in trials if trial.state not in ("RUNNING", "FAIL")]
    new_epochs = statistics.mean(ended) if ended else config.train.epochs
    work = remaining_work(config, trials, [], new_epochs, lambda _: pace)
    return eta(work, slots, last_start=seconds_left(config, trials)) if work else None


def format_time_left(seconds: float) -> str:
    """Return an estimate as "about 40 s left"; seconds are rounded to tens."""
    return f"about {format_duration(max(10, round(seconds / 10) * 10) if seconds < 90 else seconds)} left"
