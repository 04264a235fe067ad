"""The cluster that a driver starts takes what the process may use, not what the machine has."""

import subprocess
import sys

PROGRAM = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import ray
from sweep.execution.cluster import local_or_remote_ray
with local_or_remote_ray():
    print(ray.cluster_resources()["CPU"])
"""


def test_cpus_that_a_batch_system_keeps_back_are_not_used() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, cwd="/")
    assert found.stdout.strip() == "1.0", found.stderr[-2000:]
