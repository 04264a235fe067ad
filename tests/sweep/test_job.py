"""A sweep as a job of a cluster of two nodes with a token: stopped and submitted again, drained, killed, and ended.

One cluster carries all the checks: what costs is to start it.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.corpus import synthetic
from data.preparation.build import prepare
from tests.sweep.cluster import Cluster, cluster, epochs, kill, settings, trials, until

TRIALS = 4
pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]


class Job:
    """`sweep submit` and what it says."""

    def __init__(self, made: Cluster, config: Path, out: Path) -> None:
        self.cluster, self.out = made, out
        self.log = out.parent / f"submit-{len(list(out.parent.glob('submit-*')))}.log"
        self.command = subprocess.Popen(
            [sys.executable, "-m", "sweep", "submit", str(config), "--out", str(out)],
            env=made.environment,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def id(self) -> str:
        return (
            until(lambda: [line for line in self.said.splitlines() if line.startswith("job ")], 90, lambda: self.said)[
                0
            ]
            .split()[1]
            .rstrip(";")
        )

    def stop(self) -> None:
        self.cluster.state("job", "stop", self.id)


def steps(out: Path, number: int) -> int:
    path = out / f"trials/{number:04d}/checkpoint.pt"
    return int(torch.load(path, weights_only=True)["progress"]["total_steps"]) if path.exists() else 0


def leftovers(made: Cluster) -> list[str]:
    """Actors and placement groups that are alive when no sweep runs; those of Ray Data itself stay with a cluster."""
    actors = [actor["class_name"] for actor in made.listed("actors", "--filter", "state=ALIVE")]
    groups = [group["placement_group_id"] for group in made.listed("placement-groups") if group["state"] != "REMOVED"]
    return [name for name in actors if not name.startswith("_") and name != "JobSupervisor"] + groups


def drain(made: Cluster) -> None:
    """Announce that the node beside the head goes away, and wait until no worker is left there."""
    alive = [node for node in made.listed("nodes") if node["state"] == "ALIVE" and not node["is_head_node"]]
    node = alive[0]["node_id"]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    made.state("drain-node", "--address", made.address, "--node-id", node, *reason)
    words = ["--filter", "state=ALIVE", "--filter", f"node_id={node}", "--filter", "class_name=RayTrainWorker"]
    until(lambda: not made.listed("actors", *words), 90, lambda: node)


@pytest.fixture(scope="module")
def played(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What was seen while the sweep was stopped and submitted again, and lost one node after a notice, one without."""
    root = tmp_path_factory.mktemp("job")
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), root / "shards")
    (root / "job.yaml").write_text(yaml.safe_dump(settings(models, shards.folder, 8, TRIALS)))
    out, seen = root / "out", {}
    with cluster() as made, contextlib.ExitStack() as ends:
        until(lambda: made.answers("job", "list"), 90, lambda: "the cluster")
        nodes = [made.add()]
        first = Job(made, root / "job.yaml", out)
        ends.callback(first.command.kill)
        until(lambda: epochs(out) >= 2, 240, lambda: first.said)
        before = {number: steps(out, number) for number in range(TRIALS)}
        first.stop()
        seen["stopped"] = first.command.wait(150)
        seen["said"] = first.said
        seen["gained"] = [steps(out, number) - before[number] for number in before]
        until(lambda: not leftovers(made), 30, lambda: str(leftovers(made)))

        again = Job(made, root / "job.yaml", out)
        ends.callback(again.command.kill)
        for notice in (True, False):
            done = epochs(out)
            until(lambda done=done: epochs(out) > done, 240, lambda: again.said)
            if notice:
                drain(made)
            kill(nodes[-1])
            nodes.append(made.add())
        seen["ended"] = again.command.wait(400)
        seen["log"] = again.said
        until(lambda: not leftovers(made), 30, lambda: str(leftovers(made)))
    seen["trials"] = trials(out)
    yield seen


def test_a_job_that_is_stopped_ends_in_order_with_a_checkpoint(played: dict[str, Any]) -> None:
    assert played["stopped"] == 75, played["said"][-2000:]
    assert "unfinished" in played["said"]
    assert sum(played["gained"]) > 0  # beyond the last regular checkpoint


def test_the_job_that_is_submitted_again_goes_on_and_ends(played: dict[str, Any]) -> None:
    assert played["ended"] == 0, played["log"][-3000:]
    assert "resumes after epoch" in played["log"]
    assert [trial["number"] for trial in played["trials"]] == list(range(TRIALS))
    assert {trial["state"] for trial in played["trials"]} == {"COMPLETE"}


def test_the_workers_of_a_trial_may_be_on_two_nodes(models: Path, tmp_path: Path) -> None:
    """Each node has one CPU, so a trial of two workers needs both; one of them dies on the way."""
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), tmp_path / "shards")
    out = tmp_path / "out"
    content = settings(models, shards.folder, 4, 2, resources={"workers": 2})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    with cluster() as made:
        until(lambda: made.answers("job", "list"), 90, lambda: "the cluster")
        node = made.add()
        environment = made.environment | {"RAY_ADDRESS": made.address}
        command = [sys.executable, "-m", "sweep", "run", str(tmp_path / "job.yaml"), "--out", str(out)]
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(command, env=environment, stdout=log, stderr=log) as driver,
        ):
            said = (tmp_path / "log").read_text
            try:
                until(lambda: epochs(out) >= 2, 240, said)
                words = ["--filter", "state=ALIVE", "--filter", "class_name=RayTrainWorker"]
                assert len({worker["node_id"] for worker in made.listed("actors", *words)}) == 2
                kill(node)
                made.add()
                assert driver.wait(500) == 0, said()[-3000:]
            finally:
                driver.kill()
    assert [(trial["state"], trial["epochs"]) for trial in trials(out)] == [("COMPLETE", 4)] * 2
