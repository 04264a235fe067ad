"""What pods run on Kubernetes: `job.sh` as the command of the Ray job and before the head ends, and a worker's hook."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.infra.test_k8s import FOLDER, ROOT, pods, rayjob

SCRIPT = FOLDER / "job.sh"


class Job:
    """`job.sh` with commands of the test's own in place of `sweep` and `ray`."""

    def __init__(self, folder: Path, sweep: str) -> None:
        for name, body in {"sweep": sweep, "ray": f'echo "$@" >> {folder}/ray.log; kill -TERM $PPID'}.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)
        path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "TMPDIR": str(folder)}
        job = {"metadata": {"job_submission_id": "speech-sweep-x7k2p"}}
        self.environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(job)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([SCRIPT, *words], env=self.environment, stdout=subprocess.DEVNULL)


def test_exit_codes_worth_a_retry_are_passed_on(tmp_path: Path) -> None:
    for code in (0, 1, 75):
        job = Job(tmp_path, f'echo "$@" > {tmp_path}/given; exit {code}')
        assert job.start("/config/sweep.yaml", "--out", "/shared/x").wait(20) == code
        assert (tmp_path / "given").read_text() == "run /config/sweep.yaml --out /shared/x\n"
        assert not (tmp_path / "ray.log").exists()


def test_invalid_configuration_stops_its_own_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 2")
    assert job.start("bad.yaml").wait(20) == -signal.SIGTERM  # the signal comes from the job server
    assert (tmp_path / "ray.log").read_text() == "job stop --no-wait speech-sweep-x7k2p\n"


def test_end_of_the_pod_waits_for_checkpoints(tmp_path: Path) -> None:
    job = Job(
        tmp_path,
        f"trap 'sleep 1; touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/up; while :; do sleep .1; done",
    )
    driver = job.start("good.yaml")
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    assert job.start("--stop").wait(20) == 0
    assert (tmp_path / "saved").exists()
    assert driver.wait(20) == 75
    assert job.start("--stop").wait(20) == 0  # nothing runs any more


@pytest.mark.long
@pytest.mark.slow
def test_pod_scripts_work_on_a_real_head() -> None:
    """An invalid configuration ends as STOPPED, which is not retried; a node can announce that it will drain."""
    from tests.sweep.cluster import cluster as ray_cluster
    from tests.sweep.cluster import until

    with ray_cluster() as made:
        until(lambda: made.answers("job", "list"), 120, lambda: "the cluster")
        own = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
        words = ["job", "submit", "--runtime-env-json", own, "--", str(SCRIPT), "/nowhere/sweep.yaml"]
        # It fails if the job fails. On a starved machine Ray may give up before the job has started: once more, then.
        until(lambda: made.answers(*words), 240, lambda: str(made.listed("jobs")))
        assert made.listed("jobs", "--filter", "status=STOPPED")
        made.environment["RAY_ADDRESS"] = made.address
        worker = pods(rayjob())["gpu-spot"]["containers"][0]
        hook = worker["lifecycle"]["preStop"]["exec"]["command"][-1]
        subprocess.run(["bash", "-ec", hook.replace("sleep 90", "true")], env=made.environment, check=True)
