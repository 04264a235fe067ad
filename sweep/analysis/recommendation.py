"""Which trial a sweep recommends: of those that are tied with the best one within noise, the cheapest.

The rule is that of one standard error (Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3),
here with the error of the paired difference: a trial is tied if the best one leads it by no more than one standard
error of their difference on the same sessions. Where configurations were trained with further seeds, their means decide
(`sweep.search.sampling.ties`). The cost of a trial is the time of its epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from data.formats import format_count, format_list
from model.evaluation.bootstrap import paired_difference
from sweep.analysis.confirm import objective
from sweep.analysis.predictions import read_predictions
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.search.cost import device_seconds, format_device_hours
from sweep.search.sampling import ties
from sweep.search.study import TrialRecord, best_first

RIVALS = 12  # trials behind the best one that are compared with it
SAVING = 0.9  # share of the best trial's cost that a cheaper one may have at most: times differ by chance, too


@dataclass(frozen=True)
class Recommendation:
    """A trial that is as good as the best one within noise, and cheaper."""

    trial: TrialRecord
    tied: int  # trials that are tied with the best one
    line: str  # why


def recommend(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> Recommendation | None:
    """Return the cheapest of the trials that are tied with the best one; None where that is the best one itself.

    Args:
        config: of the sweep.
        folder: of the sweep, with the predictions of its trials.
        trials: of its study.
    """
    done = best_first(config, trials)
    if len(done) < 2:
        return None
    best, rivals = done[0], done[1 : RIVALS + 1]
    if any(trial.repeats is not None for trial in trials):
        trained = ties.tied(config, trials)
        error = ties.noise(ties.by_mean(config, trials), trials)
        numbers = {configuration.number for configuration in trained}
        return _cheapest(config, best, [(rival, error) for rival in done[1:] if rival.number in numbers])
    try:
        sums, task = objective(config, trial_folder(folder, best.number))
        predictions = read_predictions(trial_folder(folder, best.number))
    except UserError:  # the objective has no interval, or the predictions are damaged
        return None
    sign, tied = (1 if config.search.direction == "maximize" else -1), list[tuple[TrialRecord, float]]()
    for rival in rivals:
        try:
            records = read_predictions(trial_folder(folder, rival.number))[task][1]
            difference, error = paired_difference(predictions[task][1], records, sums)
        except (UserError, KeyError, ValueError):  # damaged or missing, or of other items, as on another fold
            continue
        if sign * difference <= error:
            tied.append((rival, error))
    return _cheapest(config, best, tied)


def _cheapest(config: Config, best: TrialRecord, tied: Sequence[tuple[TrialRecord, float]]) -> Recommendation | None:
    """Return the cheapest of the trials that are tied with the best one, each with the error; None if that is none."""
    cost = device_seconds([best])
    cheaper = [(rival, error) for rival, error in tied if device_seconds([rival]) <= SAVING * cost]
    if not cheaper:
        return None
    trial, error = min(cheaper, key=lambda pair: device_seconds([pair[0]]))
    line = (
        f"recommended: trial {trial.number}, {config.search.metric} {trial.value:.3f}: tied with trial {best.number} "
        f"within noise (standard error of the difference {error:.3f}), and cheaper: "
        f"{format_device_hours(config, device_seconds([trial]))}, not {format_device_hours(config, cost)}"
    )
    return Recommendation(trial, len(tied), line)


def tie_line(config: Config, trials: Sequence[TrialRecord]) -> str | None:
    """Return what further seeds say about the best configurations; None where there are none."""
    if not any(trial.repeats is not None for trial in trials):
        return None
    trained = ties.by_mean(config, trials)
    best, *others = ties.tied(config, trials)

    def mean(configuration: ties.Trained) -> str:
        return f"{configuration.mean:.3f} in the mean of {format_count(len(configuration.values), 'seed')}"

    rivals = format_list([f"#{other.number} ({mean(other)})" for other in others])
    verdict = f"tied with {rivals}" if others else "ahead of all others by more than the noise"
    return (
        f"further seeds: trial {best.number} has {config.search.metric} {mean(best)}, {verdict}; standard deviation "
        f"between seeds {ties.noise(trained, trials):.3f}"
    )
