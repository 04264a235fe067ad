"""The batch script in a real Slurm: its decisions with stand-ins for `ray` and `sweep`, and whole sweeps."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.corpus import synthetic
from data.preparation.build import prepare
from tests.infra.slurm import Slurm, missing, processes_of, slurm
from tests.sweep.cluster import epochs, settings, trials, until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "infra/slurm/sweep.sbatch")
SMALL = ("--cpus-per-task=1", "--mem=1500")  # of two CPUs and 4000 MB, so that jobs run side by side
TRIALS, EPOCHS = 2, 40  # longer than the time limit below
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
)
Jobs = dict[str, tuple[int, Path]]  # number and folder, by name
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
rm -f "$here"/node-*  # the next attempt starts Ray again
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


def play(cluster: Slurm, folder: Path, *codes: object, options: tuple[str, ...] = (), **variables: str) -> int:
    """Submit a job whose sweeps end with these codes; its stand-ins and what they note are in the folder."""
    folder.mkdir(exist_ok=True)
    for name, text in {"ray": RAY, "sweep": SWEEP}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    return cluster.submit(*SMALL, *options, SCRIPT, "mine.yaml", "--out", "x", SWEEP_BIN=str(folder), **variables)


@pytest.fixture(scope="module")
def jobs(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All jobs at once: while the first waits for its time limit, the others run."""
    root = tmp_path_factory.mktemp("jobs")
    limit = ("--time=1", "--signal=B:USR1@50")  # Slurm looks every 30 s

    def submit(name: str, *codes: object, **options: Any) -> tuple[int, Path]:
        return play(cluster, root / name, *codes, **options), root / name

    made = {
        "limited": submit("limited", *["stopped"] * 3, options=limit, SWEEP_FAILURES="1"),
        "retried": submit("retried", 1, 137, 0, options=("--gpus-per-node=2",)),
        "both": submit("both", 0, options=("--nodes=2",)),
        "invalid": submit("invalid", 2, 0),
        "failing": submit("failing", 1, 75, 0, SWEEP_FAILURES="2"),
        "absent": (cluster.submit(*SMALL, SCRIPT, "demo", PATH="/usr/bin:/bin:/usr/sbin"), root),
    }
    (root / "broken").mkdir()
    (root / "broken/broken").touch()
    return made | {"broken": submit("broken", 0, SWEEP_FAILURES="1")}


@pytest.mark.long  # Slurm itself takes a minute for it
def test_job_is_requeued_until_it_is_cancelled(cluster: Slurm, jobs: Jobs) -> None:
    """Any number of times, after a time limit and a requeue: those are no failures."""
    number, folder = jobs["limited"]

    def log() -> str:
        return cluster.log(number)

    for restarts in ("1", "2"):
        until((folder / "runs").exists, 60, log)
        (folder / "runs").unlink()
        if restarts == "2":  # the next attempt must not reach the limit before it is cancelled
            cluster("scontrol", "update", f"JobId={number}", "TimeLimit=30")
            cluster("scontrol", "requeue", str(number))
        until(lambda restarts=restarts: cluster.job(number)["Restarts"] == restarts, 120, log)
        until((folder / "asked").exists, 60, log)
        (folder / "asked").unlink()
    until((folder / "runs").exists, 60, log)
    cluster("scancel", str(number))
    assert cluster.wait(number, "CANCELLED")["Restarts"] == "2"
    until(lambda: not processes_of(number), 60, lambda: str(processes_of(number)))
    assert all(f"{name}: asking the sweep" in log() for name in ("USR1", "TERM"))
    assert "--signal=B:USR1@300" in Path(SCRIPT).read_text()


def test_failed_attempts_are_retried_until_the_sweep_ends(cluster: Slurm, jobs: Jobs) -> None:
    """Under the same number; then the job ends, and leaves neither a process nor a token."""
    number, folder = jobs["retried"]
    job = cluster.wait(number, "COMPLETED")
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "2")
    assert "attempt failed with 137, 2 in a row" in cluster.log(number)
    given, address, *modes = (folder / "given").read_text().rsplit(maxsplit=3)
    assert (given, modes) == ("run mine.yaml --out x", ["600", "700"])  # of the token and its folder
    assert address.startswith("127.0.0.1:")
    words = (folder / "called-0").read_text().split()
    assert {"--num-gpus=2", "--num-cpus=1", "--dashboard-host=127.0.0.1", "--head"} <= set(words)
    logs = {path.name for path in (cluster.folder / f"slurm-logs/{number}").iterdir()}
    assert logs >= {"ray-0.log", "ray-2.log"} and "token" not in logs
    # Slurm may still be ending what an earlier attempt waited with.
    until(lambda: not processes_of(number), 60, lambda: str(processes_of(number)))
    assert not list(Path("/tmp").glob(f"sw-{number}-*"))


def test_all_nodes_of_a_job_join_one_cluster(cluster: Slurm, jobs: Jobs) -> None:
    number, folder = jobs["both"]
    cluster.wait(number, "COMPLETED")
    head, worker = ((folder / f"called-{rank}").read_text() for rank in (0, 1))
    address = (folder / "given").read_text().split()[-3]
    assert f"--port={address.rpartition(':')[2]} " in head
    assert f"--address={address} " in worker
    assert "--head" not in worker


def test_jobs_that_cannot_succeed_end_with_their_code(cluster: Slurm, jobs: Jobs) -> None:
    """Invalid settings are not retried, and other failures a limited number of times."""
    numbers = [jobs[name][0] for name in ("invalid", "failing", "absent", "broken")]
    ends = [cluster.wait(number, "FAILED") for number in numbers]
    codes = [(job["ExitCode"], job["Restarts"]) for job in ends]
    assert codes == [("2:0", "0"), ("75:0", "1"), ("2:0", "0"), ("1:0", "0")]
    assert "there is no `sweep` here" in cluster.log(jobs["absent"][0])
    assert "error: Ray did not start on 1 node(s), no trial was touched: " in cluster.log(jobs["broken"][0])
    assert "no port is free" in cluster.log(jobs["broken"][0])
    assert not (jobs["broken"][1] / "given").exists()


@pytest.fixture
def config(models: Path, tmp_path: Path) -> Path:
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), tmp_path / "shards")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings(models, shards.folder, EPOCHS, TRIALS)))
    return tmp_path / "job.yaml"


BIN = {"SWEEP_BIN": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sweep_survives_its_time_limit_and_a_requeue(cluster: Slurm, config: Path, tmp_path: Path) -> None:
    """`make test` runs the same with a stand-in (above), and kills a real sweep (tests/kill)."""
    out, limit = tmp_path / "out", ("--time=2", "--signal=B:USR1@60")  # which comes after 30 to 60 s
    number = cluster.submit("--cpus-per-task=2", "--mem=3000", *limit, SCRIPT, str(config), "--out", str(out), **BIN)
    until(lambda: cluster.job(number)["Restarts"] == "1", 300, lambda: cluster.log(number))
    cluster("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    done = epochs(out)
    until(lambda: epochs(out) > done, 300, lambda: cluster.log(number))
    cluster("scontrol", "requeue", str(number))
    assert cluster.wait(number, "COMPLETED", seconds=600)["Restarts"] == "2"
    assert [(trial["number"], trial["state"], trial["epochs"]) for trial in trials(out)] == [
        (number, "COMPLETE", EPOCHS) for number in range(TRIALS)
    ]
    assert "USR1: asking the sweep" in cluster.log(number)
    until(lambda: not processes_of(number), 60, lambda: str(processes_of(number)))
    assert not list(Path("/tmp").glob(f"sw-{number}-*"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_cancelled_sweep_on_two_nodes_is_resumed(cluster: Slurm, config: Path, tmp_path: Path) -> None:
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
