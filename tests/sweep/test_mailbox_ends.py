"""A mailbox that is asked to end does so, though calls that wait in it would never end."""

from collections.abc import Iterator

import psutil
import pytest
import ray

from sweep.execution.cluster import local_or_remote_ray
from sweep.execution.mailbox import Mailbox

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_or_remote_ray():
        yield


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
