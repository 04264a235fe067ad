"""Placement groups that a dead Train controller left, and that would keep their CPUs and GPUs until the sweep ends.

Ray Train registers a group with its cleaner only once its workers have started, so a controller that dies while they
start leaves it. It is known by having no actor in it.
"""

import contextlib
import threading
from collections.abc import Iterator

EVERY = 5.0  # seconds between two looks


@contextlib.contextmanager
def removed() -> Iterator[None]:
    """Look for such groups of this job, from a thread, while the block runs."""
    ended = threading.Event()
    thread = threading.Thread(target=_look, args=(ended,), daemon=True, name="orphans")
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _look(ended: threading.Event) -> None:
    former: set[str] = set()
    while not ended.wait(EVERY):
        with contextlib.suppress(Exception):  # the control plane is away for a moment
            now = empty_groups()
            for group in now & former:  # seen twice: an actor is made right after its group
                _remove(group)
            former = now


def empty_groups() -> set[str]:
    """Ids of this job's placement groups that hold resources and no actor."""
    import ray
    from ray.util.state import list_actors, list_placement_groups

    context = ray.get_runtime_context()
    where = {"address": context.gcs_address, "limit": 1000}  # named, since other clusters may run on this machine
    job = context.get_job_id()
    made = list_placement_groups(filters=[("creator_job_id", "=", job), ("state", "=", "CREATED")], **where)
    if not made:
        return set()
    actors = list_actors(filters=[("job_id", "=", job), ("state", "!=", "DEAD")], detail=True, **where)
    return {group.placement_group_id for group in made} - {actor.placement_group_id for actor in actors}


def _remove(group: str) -> None:
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
