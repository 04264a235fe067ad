"""How the makespan of a sweep changes with nodes: raylets on this machine, one CPU and one trial each.

All nodes share the CPUs of the machine, so more nodes than CPUs cannot make it shorter; they show what a node costs.
"""

import subprocess
import sys

from tests.bench.growth import HOURS, MIDDLE, settings
from tests.bench.measure import Row
from tests.bench.sweeps import makespan
from tests.sweep.cluster import cluster, until

NODES = (1, 2, 4)
COUNT = "import ray; ray.init(logging_level='ERROR', log_to_driver=False); print(len(ray.nodes()))"


def run() -> list[Row]:
    """The makespan on more nodes, relative to that on one."""
    walls = {nodes: wall(nodes) for nodes in NODES}
    rows = []
    for nodes in NODES[1:]:
        note = f"{walls[nodes]:.0f} s against {walls[1]:.0f} s; {MIDDLE} trials, without the start of the cluster"
        rows.append(Row(f"makespan on {nodes} nodes", "one node", [walls[nodes] / walls[1]], note=note))
    return rows


def wall(nodes: int) -> float:
    """Return the seconds of a sweep on a cluster of this many nodes."""
    with cluster(dashboard=False) as made:
        environment = made.environment | {"RAY_ADDRESS": made.address}

        def alive() -> bool:
            words = [sys.executable, "-c", COUNT]
            counted = subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout
            return counted.strip() == str(nodes)

        until(lambda: made.answers("status"), 90, lambda: "the head")
        for _ in range(nodes - 1):
            made.add()
        until(alive, 120, lambda: f"{nodes} nodes")
        return makespan(settings(MIDDLE, HOURS[0], nodes, 1), variables=environment).wall
