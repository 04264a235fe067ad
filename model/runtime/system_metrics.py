"""What else a trial's machine does: the metrics `system/…`, under the names that MLflow's own monitor has for them.

There is no thread for it: it is asked for where the curve is written anyway, between steps, and not more often than
every few seconds. Steps that are done again after a kill are told again, with other values; of a step the first counts.
"""

import contextlib
import time

import psutil
import torch

EVERY = 10.0  # seconds
PREFIX = "system/"
MEGABYTE = 1e6


class SystemMetrics:
    """Of the node that a trial's first worker runs on, and of the GPUs that it sees.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.due = time.monotonic() + EVERY
        self.told = False
        psutil.cpu_percent()  # which counts from one call to the next

    def sample(self, once: bool = False) -> dict[str, float]:
        """What is used now, by metric; nothing where that was told a moment ago.

        Args:
            once: tell it even so if it was never told, since a short trial has no other chance.
        """
        now = time.monotonic()
        if now < self.due and (self.told or not once):
            return {}
        self.due, self.told = now + EVERY, True
        found = _node()
        if self.device.type == "cuda":
            for place in range(torch.cuda.device_count()):
                found |= {f"gpu_{place}_{name}": value for name, value in _gpu(place).items()}
        return {f"{PREFIX}{name}": round(value, 1) for name, value in found.items()}


def _node() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
    }


def _gpu(place: int) -> dict[str, float]:
    """As far as the driver tells: a slice of a GPU has no utilization, for one. No training ends for want of this."""
    found = {}
    with contextlib.suppress(Exception):
        used = torch.cuda.device_memory_used(place)
        found["memory_usage_megabytes"] = used / MEGABYTE
        found["memory_usage_percentage"] = used / torch.cuda.get_device_properties(place).total_memory * 100
    with contextlib.suppress(Exception):
        found["utilization_percentage"] = float(torch.cuda.utilization(place))
    with contextlib.suppress(Exception):
        found["power_usage_watts"] = torch.cuda.power_draw(place) / 1000
    return found
