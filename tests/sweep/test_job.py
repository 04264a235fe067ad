"""A sweep as a job of a cluster of two nodes with a token: stopped and submitted again, drained, killed, and ended.

One cluster carries all the checks, since starting it is what costs.
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
    """`sweep submit` and its output."""

    def __init__(self, cluster: Cluster, config: Path, out: Path) -> None:
        self.cluster, self.log = cluster, out.parent / f"submit-{len(list(out.parent.glob('submit-*')))}.log"
        command = [sys.executable, "-m", "sweep", "submit", str(config), "--out", str(out)]
        log = self.log.open("wb")
        self.command = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        def ids() -> list[str]:
            return [line.split()[1].rstrip(";") for line in self.output().splitlines() if line.startswith("job ")]

        self.cluster.state("job", "stop", until(ids, 90, self.output)[0])


def steps(out: Path, number: int) -> int:
    path = out / f"trials/{number:04d}/checkpoint.pt"
    return int(torch.load(path, weights_only=True)["progress"]["total_steps"]) if path.exists() else 0


def orphans(cluster: Cluster) -> list[str]:
    """Return the actors and placement groups that are alive when no sweep runs; those of Ray Data stay."""
    actors = [actor["class_name"] for actor in cluster.listed("actors", "--filter", "state=ALIVE")]
    groups = [
        group["placement_group_id"] for group in cluster.listed("placement-groups") if group["state"] != "REMOVED"
    ]
    return [name for name in actors if not name.startswith("_") and name != "JobSupervisor"] + groups


def drain(cluster: Cluster) -> None:
    """Announce that the node beside the head will go away, and wait until no worker is left on it."""
    alive = [node for node in cluster.listed("nodes") if node["state"] == "ALIVE" and not node["is_head_node"]]
    node = alive[0]["node_id"]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    cluster.state("drain-node", "--address", cluster.address, "--node-id", node, *reason)
    words = ["--filter", "state=ALIVE", "--filter", f"node_id={node}", "--filter", "class_name=TrialWorker"]
    until(lambda: not cluster.listed("actors", *words), 90, lambda: node)


@pytest.fixture(scope="module")
def played(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Stop a sweep, submit it again, take one node away after a notice and one without, and return what was seen."""
    root = tmp_path_factory.mktemp("job")
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), root / "shards")
    (root / "job.yaml").write_text(yaml.safe_dump(settings(models, shards.folder, 8, TRIALS)))
    out, seen = root / "out", {}
    with cluster() as made, contextlib.ExitStack() as ends:
        until(lambda: made.answers("job", "list"), 90, lambda: "the cluster")
        nodes = [made.add()]
        first = Job(made, root / "job.yaml", out)
        ends.callback(first.command.kill)
        until(lambda: epochs(out) >= 2, 240, first.output)
        before = {number: steps(out, number) for number in range(TRIALS)}
        first.stop()
        seen["stopped"], seen["first"] = first.command.wait(150), first.output()
        seen["gained"] = [steps(out, number) - before[number] for number in before]
        until(lambda: not orphans(made), 30, lambda: str(orphans(made)))

        second = Job(made, root / "job.yaml", out)
        ends.callback(second.command.kill)
        for notice in (True, False):
            done = epochs(out)
            until(lambda done=done: epochs(out) > done, 240, second.output)
            if notice:
                drain(made)
            kill(nodes[-1])
            nodes.append(made.add())
        seen["ended"], seen["second"] = second.command.wait(400), second.output()
        until(lambda: not orphans(made), 30, lambda: str(orphans(made)))
    yield seen | {"trials": trials(out)}


def test_stopped_job_ends_with_checkpoints(played: dict[str, Any]) -> None:
    assert played["stopped"] == 75, played["first"][-2000:]
    assert "unfinished: " in played["first"]
    assert sum(played["gained"]) > 0  # beyond the last regular checkpoint


def test_resubmitted_job_resumes_and_ends(played: dict[str, Any]) -> None:
    assert played["ended"] == 0, played["second"][-3000:]
    assert "resumes after epoch" in played["second"]
    assert [trial["number"] for trial in played["trials"]] == list(range(TRIALS))
    assert {trial["state"] for trial in played["trials"]} == {"COMPLETE"}


def test_trial_survives_one_of_its_two_nodes(models: Path, tmp_path: Path) -> None:
    """Each node has one CPU, so a trial of two workers needs both."""
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), tmp_path / "shards")
    out, config, log = tmp_path / "out", tmp_path / "job.yaml", tmp_path / "log"
    config.write_text(yaml.safe_dump(settings(models, shards.folder, 4, 2, resources={"workers": 2})))
    command = [sys.executable, "-m", "sweep", "run", str(config), "--out", str(out)]
    with cluster() as made:
        until(lambda: made.answers("job", "list"), 90, lambda: "the cluster")
        node, environment = made.add(), made.environment | {"RAY_ADDRESS": made.address}
        with log.open("wb") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
            try:
                until(lambda: epochs(out) >= 2, 240, log.read_text)
                words = ["--filter", "state=ALIVE", "--filter", "class_name=RayTrainWorker"]
                assert len({worker["node_id"] for worker in made.listed("actors", *words)}) == 2
                kill(node)
                made.add()
                assert process.wait(500) == 0, log.read_text()[-3000:]
            finally:
                process.kill()
    assert [(trial["state"], trial["epochs"]) for trial in trials(out)] == [("COMPLETE", 4)] * 2
