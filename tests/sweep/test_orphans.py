"""What Ray would leave: placement groups of dead controllers, and actors that wait for calls which never end."""

import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from sweep import orphans
from sweep.cluster import local_or_remote_ray
from sweep.mailbox import Mailbox
from sweep.orphans import empty_groups, removed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_or_remote_ray():
        yield


class Worker:
    def answer(self) -> int:
        return 1


def test_a_group_without_an_actor_goes_and_one_in_use_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "EVERY", 0.5)
    used, empty = placement_group([{"CPU": 0.5}]), placement_group([{"CPU": 0.5}])
    ray.get([used.ready(), empty.ready()], timeout=60)
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(used)
    worker = ray.remote(Worker).options(num_cpus=0.5, scheduling_strategy=strategy).remote()
    assert ray.get(worker.answer.remote(), timeout=60) == 1
    assert empty_groups() == {empty.id.hex()}
    before = threading.active_count()
    with removed():
        end = time.monotonic() + 30
        while placement_group_table(empty)["state"] != "REMOVED":
            assert time.monotonic() < end
            time.sleep(0.2)
        time.sleep(1.5)
    assert placement_group_table(used)["state"] == "CREATED"
    assert empty_groups() == set()
    assert threading.active_count() <= before + 1


def test_a_mailbox_that_is_asked_to_end_ends() -> None:
    """By itself Ray would wait for the calls in flight, and so would everybody who waits for an answer."""
    box = Mailbox.remote()  # type: ignore[attr-defined]
    version = ray.get(box.assign.remote({}))
    waiting = [box.take.remote(version), box.stopped.remote()]
    [process] = [child for child in psutil.Process().children(recursive=True) if "Mailbox" in " ".join(child.cmdline())]
    process.terminate()
    for reference in waiting:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(reference, timeout=20)
