"""The estimated time that the remaining trials of a sweep take."""

import heapq
import statistics
from collections.abc import Callable, Mapping, Sequence

from data.formats import format_duration
from sweep.config.schema import Config
from sweep.config.space import Value
from sweep.search.cost import horizon
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
    """Return the seconds of training that each running trial and each trial to come still needs.

    Args:
        config: of the sweep.
        trials: of the study.
        points: the values of the trials that start next.
        new_epochs: the expected number of epochs of a trial that has not started.
        epoch_seconds: the seconds of an epoch by the values of a trial; None: of a trial with unknown values.
    """
    running = [
        epoch_seconds(trial.params) * (horizon(config, trial.params) - len(trial.curve))
        for trial in trials
        if trial.state == "RUNNING"  # how far a paused one will continue is unknown
    ]
    new = max(0, total_trials(config, trials) - len(trials))
    values = [*points[:new], *[None] * (new - len(points[:new]))]
    return running + [epoch_seconds(value) * new_epochs for value in values]


def eta(work: Sequence[float], slots: int, startup: float = 0.0, trial_startup: float = 0.0) -> float:
    """Return the seconds until the last trial ends, if each worker group takes the next trial as soon as it is free.

    Args:
        work: the seconds of each trial, in the order in which they start.
        slots: trials at a time.
        startup: seconds until a worker group can start its first trial.
        trial_startup: seconds from the start of a trial to its first step.
    """
    ends = [startup] * max(1, min(slots, len(work)))
    for seconds in work:
        heapq.heapreplace(ends, ends[0] + trial_startup + seconds)
    return max(ends)


def observed_eta(config: Config, trials: Sequence[TrialRecord], slots: int) -> float | None:
    """Return the seconds until the last trial ends, estimated from the epochs that trials have finished.

    Returns:
        None before the first epoch, and if no trial is left.
    """
    paces = [
        trial.metrics["seconds"] / len(trial.curve) for trial in trials if trial.curve and "seconds" in trial.metrics
    ]
    if not paces:
        return None
    pace = float(statistics.median(paces))
    # New trials are expected to end as early as those before them, because pruning ends many of them.
    ended = [len(trial.curve) for trial in trials if trial.state not in ("RUNNING", "FAIL")]
    new_epochs = statistics.mean(ended) if ended else config.train.epochs
    work = remaining_work(config, trials, [], new_epochs, lambda _: pace)
    return eta(work, slots) if work else None


def format_time_left(seconds: float) -> str:
    """Return an estimate as "about 40 s left"; seconds are rounded to tens."""
    return f"about {format_duration(max(10, round(seconds / 10) * 10) if seconds < 90 else seconds)} left"
