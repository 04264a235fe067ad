"""How far a sweep is, what it cost, and the JSON of its trials that scripts rely on."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from data.formats import format_hours
from sweep.config.schema import Config
from sweep.preflight.eta import format_time_left, observed_eta
from sweep.search.cost import budget_lines, device_hours, device_name, device_seconds
from sweep.search.stopping import ended_early, total_trials
from sweep.search.study import TrialRecord, best_first

VAGUE = ("dtype", "enabled", "init_from", "kind", "path")  # names of settings that say nothing by themselves
ORDER = ("COMPLETE", "PRUNED", "PAUSED", "RUNNING", "FAIL")


class TrialJson(TypedDict):
    """A trial as `sweep status --json` and `sweep best --json` print it."""

    number: int
    state: str
    params: Mapping[str, object]
    value: float | None
    metrics: Mapping[str, object]
    steps: int
    epochs: int  # that it has trained for
    epoch: int  # whose value, metrics and weights are its result
    share: float | None  # of the training groups, with search.fidelity: data
    repeats: int | None  # number of the trial whose configuration it trains with a fresh seed
    audited: bool
    spared: int | None
    attempts: int | None
    reason: str | None
    why: str
    mlflow_run_id: str | None


def ranked(config: Config, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the complete trials, best first, and behind them the others by the epochs that they reached.

    The further seeds of a configuration follow its first trial.
    """
    sign = -1 if config.search.direction == "maximize" else 1
    places = {trial.number: place for place, trial in enumerate(best_first(config, trials))}

    def key(trial: TrialRecord) -> tuple[int, float, float, int]:
        if trial.state == "COMPLETE":
            return 0, places.get(trial.number if trial.repeats is None else trial.repeats, 0), 0, trial.number
        value = sign * (trial.value if trial.value is not None else 0)
        return ORDER.index(trial.state), -len(trial.curve), value, trial.number

    return sorted(trials, key=key)


@dataclass(frozen=True)
class Progress:
    """How far a sweep is."""

    target: int  # total number of trials
    complete: int
    pruned: int
    failed: int
    running: int  # in the study: started and not ended, even if no process runs them now
    best: TrialRecord | None
    seconds_left: float | None  # an estimate; None before the first epoch, and when nothing is left
    hours: float  # of the devices, in finished epochs
    device: Literal["GPU", "CPU"]
    paused: int = 0  # at a rung: they continue when they are among the best there
    budget: Sequence[str] = ()  # what is spent of each of its limits
    ended: str | None = None  # why no more trials start, where the search ended before `search.trials`

    @property
    def done(self) -> int:
        """Return the number of trials in a final state."""
        return self.complete + self.pruned + self.failed

    def format_hours(self) -> str:
        """Return the device hours that were used."""
        return format_hours(self.hours, self.device)

    def line(self) -> str:
        """Return the progress in one line."""
        counts = {"complete": self.complete, "running": self.running, "paused": self.paused}
        counts |= {"pruned": self.pruned, "failed": self.failed}
        parts = [f"{self.done}/{self.target} trials done"]
        parts += [", ".join(f"{count} {name}" for name, count in counts.items() if count)]
        parts += [f"best {self.best.value:.3f} (#{self.best.number})"] if self.best else []
        parts += [format_time_left(self.seconds_left)] if self.seconds_left is not None else []
        parts += [self.format_hours()] if self.hours else []
        return "; ".join(filter(None, [*parts, *(f"budget {line}" for line in self.budget)]))


def progress(config: Config, trials: Sequence[TrialRecord], slots: int | None = None) -> Progress:
    """Count the trials of a sweep by state, and estimate the time that is left.

    Args:
        config: of the sweep.
        trials: of its study.
        slots: trials that run at the same time; None: `resources.slots`, or else as many as run now.
    """
    states, resources = Counter(trial.state for trial in trials), config.resources
    return Progress(
        target=max(total_trials(config, trials), len(trials)),
        complete=states["COMPLETE"],
        pruned=states["PRUNED"],
        failed=states["FAIL"],
        running=states["RUNNING"],
        paused=states["PAUSED"],
        best=next(iter(best_first(config, trials)), None),
        seconds_left=observed_eta(config, trials, slots or resources.slots or max(1, states["RUNNING"])),
        hours=device_hours(config, device_seconds(trials)),
        device=device_name(config),
        budget=budget_lines(config, trials),
        ended=ended_early(config, trials),
    )


def trial_json(trial: TrialRecord, run_id: str | None, attempts: int | None = None) -> TrialJson:
    """Return a trial in the form that scripts rely on.

    Args:
        trial: of the study.
        run_id: of MLflow, if the trial has a run.
        attempts: how often it was started, if that was recorded.
    """
    return {
        "number": trial.number,
        "state": trial.state,
        "params": trial.params,
        "value": None if trial.value is None else _finite(trial.value),
        "metrics": {
            name: _finite(value) if isinstance(value, float) else value for name, value in trial.metrics.items()
        },
        "steps": trial.steps,
        "epochs": len(trial.curve),
        "epoch": trial.epoch,
        "share": trial.share,
        "repeats": trial.repeats,
        "audited": trial.audited,
        "spared": trial.exempted_at,
        "attempts": attempts,
        "reason": trial.reason,
        "why": trial.why,
        "mlflow_run_id": run_id,
    }


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest ending of each dotted key that is unique and says something, by key."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for size in range(1 + (parts[-1] in VAGUE), len(parts) + 1):
            ending = ".".join(parts[-size:])
            if sum(f".{other}".endswith(f".{ending}") for other in keys) == 1:
                break
        names[key] = ending
    return names
