"""Resources: how many trials run at a time on the nodes of a cluster."""

from typing import Any

import pytest

from data.errors import UserError
from sweep.execution.cluster import count_slots
from sweep.runner import count_trained
from tests.sweep.common import settings

SMALL, LARGE = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("resources", "nodes", "slots"),
    [
        ({}, [SMALL], 2),
        ({}, [SMALL, SMALL], 4),
        ({"workers": 2}, [SMALL, SMALL], 2),
        ({"cpus_per_worker": 1.5}, [SMALL, SMALL], 2),  # not 3 x 4 / 1.5: half a CPU on each of two nodes is no CPU
        ({"gpus_per_worker": 0.25}, [SMALL, LARGE], 4),
        ({"gpus_per_worker": 1, "workers": 2}, [LARGE, LARGE], 1),
        ({"slots": 3}, [LARGE], 3),
        ({"slots": 40}, [LARGE], 16),
        ({"slots": 4, "gpus_per_worker": 1}, [SMALL], 4),  # a cluster that grows on demand
    ],
)
def test_slots_follow_the_resources_of_nodes(
    resources: dict[str, Any], nodes: list[dict[str, float]], slots: int
) -> None:
    config = settings().with_values({f"resources.{key}": value for key, value in resources.items()})
    assert count_slots(config, nodes, left=100) == slots
    assert count_slots(config, nodes, left=1) == 1
    assert count_slots(config, nodes, left=0) == 1


def test_too_small_cluster_is_refused() -> None:
    config = settings().with_values({"resources.gpus_per_worker": 1})
    with pytest.raises(UserError, match=r"a trial needs 1 x .*GPU.*, the nodes have .*resources.slots if the cluster"):
        count_slots(config, [SMALL], left=3)


def test_trained_parameters_are_counted_without_weights(models: Any, corpus: Any) -> None:
    paths = {"model.encoder.path": str(models / "whisper"), "model.llm.path": str(models / "llm")}
    config = settings(space={}, points=[]).with_values({**paths, "data.shards": str(corpus.folder)})
    small, large = (count_trained(config.with_values({"model.lora.rank": rank})) for rank in (2, 16))
    assert 0 < small < large
