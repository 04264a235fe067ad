"""What trials cost, and the budget of a sweep: device hours, hours by the clock, steps and full trainings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from data.formats import format_hours
from model.training.progress import Metrics
from sweep.config.schema import Config
from sweep.config.space import EPOCHS, Value, whole

COSTS = ("epoch", "steps", "seconds", "data_wait")  # metrics that count what was spent up to an epoch
LABELS = {"hours": "hours by the clock", "steps": "steps", "trials": "full trainings"}  # of a budget's limits


class Spending(Protocol):
    """What the costs of a trial are counted from."""

    @property
    def params(self) -> Mapping[str, Value]: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def steps(self) -> int: ...
    @property
    def curve(self) -> Mapping[int, float]: ...
    @property
    def clock(self) -> float: ...


def device_seconds(trials: Sequence[Spending]) -> float:
    """Return the seconds of all epochs that trials have finished."""
    return sum(float(trial.metrics.get("seconds", 0.0)) for trial in trials)


def device_hours(config: Config, seconds: float) -> float:
    """Convert a trial's seconds to hours of the GPUs, or else the CPU cores, that it occupies."""
    resources = config.resources
    return seconds * resources.workers * (resources.gpus_per_worker or resources.cpus_per_worker) / 3600


def device_name(config: Config) -> Literal["GPU", "CPU"]:
    """Return the kind of device that a sweep's hours are counted in."""
    return "GPU" if config.resources.gpus_per_worker else "CPU"


def format_device_hours(config: Config, seconds: float) -> str:
    """Return a trial's seconds as device hours, "1.25 GPU-hours"."""
    return format_hours(device_hours(config, seconds), device_name(config))


def horizon(config: Config, params: Mapping[str, Value]) -> int:
    """Return the epochs that a trial with these values trains for, unless something ends it; on all shares together."""
    return (whole(params.get(EPOCHS)) or config.train.epochs) * len(config.search.shares)


def full_epochs(config: Config, epochs: Iterable[int]) -> float:
    """Return how many epochs on the whole training split cost as much as some epochs of a trial."""
    return sum(config.search.share_at(epoch, config.train.epochs) for epoch in epochs)


def spent(config: Config, trials: Sequence[Spending]) -> dict[str, float]:
    """Return what trials have spent of each limit that a budget may have, as far as it was recorded."""
    return {
        "gpu_hours": device_hours(config, device_seconds(trials)),
        "hours": max((trial.clock for trial in trials), default=0.0) / 3600,
        "steps": sum(trial.steps for trial in trials),
        "trials": sum(
            full_epochs(config, trial.curve) * len(config.search.shares) / horizon(config, trial.params)
            for trial in trials
        ),
    }


def budget_lines(config: Config, trials: Sequence[Spending]) -> list[str]:
    """Return what is spent of each limit of the budget: "1,200 of 1,000 steps"."""
    used, budget = spent(config, trials), config.search.budget

    def amount(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return [
        f"{amount(used[name])} of {amount(limit)} {LABELS.get(name, f'{device_name(config)}-hours')}"
        for name, limit in (budget.limits() if budget else {}).items()
    ]


def spent_budget(config: Config, trials: Sequence[Spending]) -> str | None:
    """Return which limit of the budget is spent, in words; None where none is, so that trials may start."""
    if config.search.budget is None:
        return None
    used = spent(config, trials)
    for name, line in zip(config.search.budget.limits(), budget_lines(config, trials), strict=True):
        if used[name] >= config.search.budget.limits()[name]:
            return f"search.budget is spent ({line})"
    return None


def spent_share(config: Config, trials: Sequence[Spending]) -> float:
    """Return the share of the budget that is spent, of the limit that comes first; 0 without a budget."""
    if config.search.budget is None:
        return 0.0
    used = spent(config, trials)
    return max(used[name] / limit for name, limit in config.search.budget.limits().items())
