"""Device hours of trials."""

from collections.abc import Sequence
from typing import Literal

from data.formats import format_hours
from sweep.config.schema import Config
from sweep.search.study import TrialRecord


def device_seconds(trials: Sequence[TrialRecord]) -> float:
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
