"""Resources of a cluster: how many trials run at a time, and the share of a node's memory that a worker gets."""

from collections.abc import Mapping, Sequence

from data.errors import UserError
from sweep.config.schema import Config

Nodes = Sequence[Mapping[str, float]]  # Ray resources of each node, by name


def count_slots(config: Config, nodes: Nodes, left: int) -> int:
    """Return the number of trials that run at the same time: as many as the nodes hold, at most as many as are left.

    Ray Data's read tasks request no CPU, so nothing is reserved for them.

    Args:
        config: of the sweep.
        nodes: of the cluster.
        left: trials that have not ended.

    Raises:
        UserError: the nodes cannot hold one trial, and `resources.slots` does not say that the cluster grows.
    """
    need, workers, wanted = worker_resources(config), config.resources.workers, config.resources.slots
    fit = sum(_capacity(config, node) for node in nodes) // workers
    if fit < 1 and wanted is None:
        have = [{name: node.get(name, 0) for name in need} for node in nodes]
        raise UserError(
            f"resources: a trial needs {workers} x {need}, the nodes have {have}; lower resources.workers or a "
            "worker's share, or set resources.slots if the cluster grows on demand"
        )
    slots = min(fit, wanted or fit) if fit else wanted or 1
    return min(slots, max(1, left))


def worker_resources(config: Config) -> dict[str, float]:
    """Return the resources that Ray reserves for one worker."""
    resources = {"CPU": config.resources.cpus_per_worker}
    return resources | ({"GPU": config.resources.gpus_per_worker} if config.resources.gpus_per_worker else {})


def memory_share(config: Config, nodes: Nodes, slots: int) -> float:
    """Return the share of a GPU's memory, or without GPUs of a node's, that a worker may use.

    Args:
        config: of the sweep.
        nodes: of the cluster.
        slots: trials that run at the same time.
    """
    resources = config.resources
    if resources.gpus_per_worker:
        return min(1.0, resources.gpus_per_worker)
    workers = max((_capacity(config, node) for node in nodes), default=1)
    return 1 / max(1, min(workers, slots * resources.workers))


def _capacity(config: Config, node: Mapping[str, float]) -> int:
    """Return the number of workers that a node has room for."""
    return min(int(node.get(name, 0) / share + 1e-9) for name, share in worker_resources(config).items())
