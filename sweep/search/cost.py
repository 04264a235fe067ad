"""Device hours of trials, and the format of durations and sizes."""

from collections.abc import Sequence
from typing import Literal

from sweep.config.schema import Config
from sweep.search.study import TrialRecord


def device_seconds(entries: Sequence[TrialRecord]) -> float:
    """Of the epochs that trials have finished."""
    return sum(float(entry.metrics.get("seconds", 0.0)) for entry in entries)


def device_hours(config: Config, seconds: float) -> str:
    """What a trial's seconds are in hours of devices, in words."""
    return _in_hours(_hours(config, seconds), _device(config))


def _hours(config: Config, seconds: float) -> float:
    resources = config.resources
    return seconds * resources.workers * (resources.gpus_per_worker or resources.cpus_per_worker) / 3600


def _device(config: Config) -> Literal["GPU", "CPU"]:
    return "GPU" if config.resources.gpus_per_worker else "CPU"


def _in_hours(hours: float, device: str) -> str:
    return f"{hours:.3g} {device}-hours"


def format_duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def format_bytes(size: int) -> str:
    """Bytes for people."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{max(1, round(size / 10**6))} MB"
