"""The batch script in a real Slurm: its decisions with stand-ins for `ray` and `sweep`, and whole sweeps."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data.corpus import synthetic
from data.preparation.build import prepare
from tests.infra.slurm import Slurm, missing, processes_of, slurm
from tests.sweep.cluster import epochs, settings, trials, until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "infra/slurm/sweep.sbatch")
SMALL = ("--cpus-per-task=2", "--mem=3000")
TRIALS, EPOCHS = 2, 40  # longer than the time limit below
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
)
RAY = """#!/bin/bash
# In place of Ray: notes how it was called, and is up as soon as it is started.
if [ "$1" = status ]; then cat "$(dirname "$0")"/node-* 2>/dev/null; exit; fi
echo "$@" > "$(dirname "$0")/called-$SLURM_PROCID"
[ ! -e "$(dirname "$0")/broken" ] || { echo "no port is free"; exit 1; }
echo " 1 node_1" > "$(dirname "$0")/node-$SLURM_PROCID"
exec sleep 600
"""
SWEEP = """#!/bin/bash
# In place of a sweep: ends with the next code of a list; "stopped" ends when it is asked to.
here=$(dirname "$0")
read -r code < "$here/codes"
sed -i 1d "$here/codes"
echo "$@ $RAY_ADDRESS $(stat -c %a "$RAY_AUTH_TOKEN_PATH" "$(dirname "$RAY_AUTH_TOKEN_PATH")" | xargs)" > "$here/given"
[ "$code" = stopped ] || exit "$code"
trap 'touch "$here/asked"; exit 75' USR1 TERM
touch "$here/runs"
while :; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as made:
        yield made


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with stand-ins."""
    for name, text in {"ray": RAY, "sweep": SWEEP}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def play(cluster: Slurm, programs: Path, *codes: object, options: tuple[str, ...] = (), **variables: str) -> int:
    (programs / "codes").write_text("".join(f"{code}\n" for code in codes))
    return cluster.submit(*SMALL, *options, SCRIPT, "mine.yaml", "--out", "x", SWEEP_BIN=str(programs), **variables)


def test_a_sweep_that_is_done_ends_the_job(cluster: Slurm, programs: Path) -> None:
    number = play(cluster, programs, 0, options=("--gpus-per-node=2",))
    job = cluster.wait(number, "COMPLETED")
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "0")
    given, address, file, folder = (programs / "given").read_text().rsplit(maxsplit=3)
    assert given == "run mine.yaml --out x"
    assert address.startswith("127.0.0.1:")
    assert (file, folder) == ("600", "700")  # of the token
    words = (programs / "called-0").read_text().split()
    assert {"--num-gpus=2", "--num-cpus=2", "--dashboard-host=127.0.0.1", "--head"} <= set(words)
    logs = cluster.folder / f"slurm-logs/{number}"
    assert [path.name for path in logs.iterdir()] == ["ray-0.log"]  # the token is gone
    assert not processes_of(number)
    assert not list(Path("/tmp").glob(f"sw-{number}-*"))


def test_all_nodes_of_a_job_join_one_cluster(cluster: Slurm, programs: Path) -> None:
    number = play(cluster, programs, 0, options=("--nodes=2",))
    cluster.wait(number, "COMPLETED")
    head, worker = ((programs / f"called-{place}").read_text() for place in (0, 1))
    address = (programs / "given").read_text().split()[-3]
    assert f"--port={address.rpartition(':')[2]} " in head
    assert f"--address={address} " in worker
    assert "--head" not in worker


def test_invalid_settings_are_not_retried(cluster: Slurm, programs: Path) -> None:
    job = cluster.wait(play(cluster, programs, 2, 0), "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")


def test_failed_attempt_is_retried_under_the_same_number(cluster: Slurm, programs: Path) -> None:
    number = play(cluster, programs, 1, 137, 0)
    job = cluster.wait(number, "COMPLETED")
    assert job["Restarts"] == "2"
    assert "attempt failed with 137, 2 in a row" in cluster.log(number)


def test_retries_are_limited(cluster: Slurm, programs: Path) -> None:
    job = cluster.wait(play(cluster, programs, 1, 75, 0, SWEEP_FAILURES="2"), "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("75:0", "1")


def test_ray_that_does_not_start_is_reported_as_such(cluster: Slurm, programs: Path) -> None:
    (programs / "broken").touch()
    number = play(cluster, programs, 0, SWEEP_FAILURES="1")
    assert cluster.wait(number, "FAILED")["ExitCode"] == "1:0"
    assert "error: Ray did not start on 1 node(s), no trial was touched: " in cluster.log(number)
    assert "no port is free" in cluster.log(number)
    assert not (programs / "given").exists()


def test_time_limit_and_requeue_put_the_job_back(cluster: Slurm, programs: Path) -> None:
    """Any number of times: that is no failure."""
    limit = ("--time=1", "--signal=B:USR1@50")  # Slurm looks every 30 s
    number = play(cluster, programs, "stopped", "stopped", 0, options=limit, SWEEP_FAILURES="1")
    for restarts in ("1", "2"):
        until((programs / "runs").exists, 60, lambda: cluster.log(number))
        (programs / "runs").unlink()
        if restarts == "2":
            cluster("scontrol", "requeue", str(number))
        until(lambda restarts=restarts: cluster.job(number)["Restarts"] == restarts, 120, lambda: cluster.log(number))
        until((programs / "asked").exists, 60, lambda: cluster.log(number))
        (programs / "asked").unlink()
    assert cluster.wait(number, "COMPLETED")["Restarts"] == "2"
    for name in ("USR1", "TERM"):
        assert f"{name}: asking the sweep" in cluster.log(number)
    assert "--signal=B:USR1@300" in Path(SCRIPT).read_text()


def test_a_job_that_is_cancelled_stays_cancelled(cluster: Slurm, programs: Path) -> None:
    number = play(cluster, programs, "stopped", 0)
    until((programs / "runs").exists, 60, lambda: cluster.log(number))
    cluster("scancel", str(number))
    assert cluster.wait(number, "CANCELLED")["Restarts"] == "0"
    until(lambda: not processes_of(number), 60, lambda: str(processes_of(number)))


def test_no_program_is_one_line(cluster: Slurm, tmp_path: Path) -> None:
    number = cluster.submit(*SMALL, SCRIPT, "demo", PATH="/usr/bin:/bin:/usr/sbin")
    assert cluster.wait(number, "FAILED")["ExitCode"] == "2:0"
    assert "there is no `sweep` here" in cluster.log(number)


@pytest.fixture
def config(models: Path, tmp_path: Path) -> Path:
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), tmp_path / "shards")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings(models, shards.folder, EPOCHS, TRIALS)))
    return tmp_path / "job.yaml"


BIN = {"SWEEP_BIN": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_outlives_its_time_limit_and_a_requeue(cluster: Slurm, config: Path, tmp_path: Path) -> None:
    """`make test` runs the same with a stand-in (above), and kills a real sweep (tests/kill)."""
    out, limit = tmp_path / "out", ("--time=2", "--signal=B:USR1@60")  # which comes after 30 to 60 s
    number = cluster.submit(*SMALL, *limit, SCRIPT, str(config), "--out", str(out), **BIN)
    until(lambda: cluster.job(number)["Restarts"] == "1", 300, lambda: cluster.log(number))
    cluster("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    done = epochs(out)
    until(lambda: epochs(out) > done, 300, lambda: cluster.log(number))
    cluster("scontrol", "requeue", str(number))
    assert cluster.wait(number, "COMPLETED", seconds=600)["Restarts"] == "2"
    assert [(trial["number"], trial["state"], trial["epochs"]) for trial in trials(out)] == [
        (place, "COMPLETE", EPOCHS) for place in range(TRIALS)
    ]
    assert "USR1: asking the sweep" in cluster.log(number)
    assert not processes_of(number)
    assert not list(Path("/tmp").glob(f"sw-{number}-*"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_on_two_nodes_is_cancelled_and_given_again(cluster: Slurm, config: Path, tmp_path: Path) -> None:
    """Each node has one CPU for it, so a trial of two workers needs both."""
    out = tmp_path / "out"
    sweep = (str(config), "--out", str(out), "--set", "resources.workers=2", "--set", "train.epochs=4", "--trials=2")
    command = ("--nodes=2", "--cpus-per-task=1", "--mem=3000", SCRIPT, *sweep)
    first = cluster.submit(*command, **BIN)
    until(lambda: epochs(out) >= 1, 300, lambda: cluster.log(first))
    cluster("scancel", str(first))
    cluster.wait(first, "CANCELLED")
    until(lambda: not processes_of(first), 60, lambda: str(processes_of(first)))
    again = cluster.submit(*command, **BIN)
    cluster.wait(again, "COMPLETED", seconds=600)
    assert "resumes after epoch" in cluster.log(again)
    assert [(trial["state"], trial["epochs"]) for trial in trials(out)] == [("COMPLETE", 4)] * 2
