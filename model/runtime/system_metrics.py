"""System metrics of a trial, `system/…`, under the names that MLflow's own monitor gives them.

No thread samples them: the training asks when it writes its metrics log, between steps, and gets a sample every few
seconds at most. Steps that are repeated after a kill are logged again with other values; the first value counts.
"""

import contextlib
import time

import psutil
import torch

INTERVAL = 10.0  # seconds between two samples
PREFIX = "system/"
MEGABYTE = 1e6


class SystemMetrics:
    """Samples the node that a trial's first worker runs on, and the GPUs that this worker sees.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.next_sample = time.monotonic() + INTERVAL
        self.sampled = False
        psutil.cpu_percent()  # measures from one call to the next

    def sample(self, at_least_once: bool = False) -> dict[str, float]:
        """Return the current values by metric, or nothing where the last sample is recent.

        Args:
            at_least_once: sample in any case if there was no sample yet: a short trial has no other chance.
        """
        now = time.monotonic()
        if now < self.next_sample and (self.sampled or not at_least_once):
            return {}
        self.next_sample, self.sampled = now + INTERVAL, True
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
        }
        if self.device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                values |= {f"gpu_{index}_{name}": value for name, value in _gpu(index).items()}
        return {f"{PREFIX}{name}": round(value, 1) for name, value in values.items()}


def _gpu(index: int) -> dict[str, float]:
    """Return what the driver reports; a slice of a GPU reports no utilization, which must not end a trial."""
    values = {}
    with contextlib.suppress(Exception):
        used = torch.cuda.device_memory_used(index)
        values["memory_usage_megabytes"] = used / MEGABYTE
        values["memory_usage_percentage"] = used / torch.cuda.get_device_properties(index).total_memory * 100
    with contextlib.suppress(Exception):
        values["utilization_percentage"] = float(torch.cuda.utilization(index))
    with contextlib.suppress(Exception):
        values["power_usage_watts"] = torch.cuda.power_draw(index) / 1000
    return values
