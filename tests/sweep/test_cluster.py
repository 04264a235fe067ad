"""A local cluster uses the CPUs that this process may use, not all of the machine."""

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


def test_local_cluster_uses_only_allowed_cpus() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, cwd="/")
    assert found.stdout.strip() == "1.0", found.stderr[-2000:]
