"""What the nodes of a cluster hold: how many trials at a time, and what is left of each for a worker."""

from collections.abc import Mapping, Sequence

from data.errors import UserError
from sweep.config.schema import Config

Nodes = Sequence[Mapping[str, float]]  # resources of each


def count_slots(config: Config, nodes: Nodes, left: int) -> int:
    """Trials that run at the same time: what the nodes hold, no more than are left.

    Ray Data's read tasks ask for no CPU, so nothing has to be left free for them.

    Args:
        config: of the sweep.
        nodes: resources of each.
        left: trials that have not ended.

    Raises:
        UserError: the nodes cannot hold a single one, and `resources.slots` does not say that there will be more.
    """
    need, workers, wanted = worker_resources(config), config.resources.workers, config.resources.slots
    fit = sum(_held(config, node) for node in nodes) // workers
    if fit < 1 and wanted is None:
        have = [{name: node.get(name, 0) for name in need} for node in nodes]
        raise UserError(
            f"resources: a trial needs {workers} x {need}, the nodes have {have}; lower resources.workers or a "
            "worker's share, or set resources.slots if the cluster grows on demand"
        )
    slots = min(fit, wanted or fit) if fit else wanted or 1
    return min(slots, max(1, left))


def worker_resources(config: Config) -> dict[str, float]:
    """What Ray sets aside for a worker."""
    resources = {"CPU": config.resources.cpus_per_worker}
    return resources | ({"GPU": config.resources.gpus_per_worker} if config.resources.gpus_per_worker else {})


def memory_share(config: Config, nodes: Nodes, slots: int) -> float:
    """Of a GPU's memory, or of a node's, that a worker may take.

    Args:
        config: of the sweep.
        nodes: resources of each.
        slots: trials at a time.
    """
    resources = config.resources
    if resources.gpus_per_worker:
        return min(1.0, resources.gpus_per_worker)
    held = max((_held(config, node) for node in nodes), default=1)
    return 1 / max(1, min(held, slots * resources.workers))


def _held(config: Config, node: Mapping[str, float]) -> int:
    """Workers that a node has room for."""
    return min(int(node.get(name, 0) / share + 1e-9) for name, share in worker_resources(config).items())
