"""A Slurm of two nodes on this machine, from Debian's packages: one folder, loopback, no systemd."""

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.sweep.cluster import free_ports, until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
NODES = ("n1", "n2")
# The grace of a killed job is short, and a job that was requeued may begin at once instead of two minutes later.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=10
JobRequeue=1
MinJobAge=3600
FirstJobId={ports[0]}
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE OverSubscribe=NO
"""


@dataclass
class Slurm:
    """A cluster that is up."""

    folder: Path
    environment: dict[str, str]

    def __call__(self, *words: str, **more: str) -> str:
        """What a command of Slurm's says."""
        run = subprocess.run(
            words, env=self.environment | more, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{words}: {run.stderr}"
        return run.stdout.strip()

    def submit(self, *words: str, **variables: str) -> int:
        """A job; the variables are those that its user has set."""
        return int(self("sbatch", "--parsable", *words, **variables))

    def job(self, number: int) -> dict[str, str]:
        """All that Slurm knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self("scontrol", "show", "job", str(number), "--oneliner")))

    def log(self, number: int) -> str:
        """What a job has written so far."""
        path = self.folder / f"sweep-{number}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, number: int, *states: str, seconds: float = 300) -> dict[str, str]:
        """A job that has come to one of these states."""
        until(
            lambda: self.job(number)["JobState"] in states, seconds, lambda: f"{self.job(number)}\n{self.log(number)}"
        )
        return self.job(number)


def processes_of(job: int) -> list[psutil.Process]:
    """Return the processes of a job that still run, on all nodes."""
    return with_variable("SLURM_JOB_ID", str(job))


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """Return the processes in whose environment a variable has this value."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.append(process)
    return found


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Two nodes with two CPUs and two GPUs each, of which only Slurm believes that they are there."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        folder.chmod(0o755)  # munged wants that everybody may reach its socket
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        for name in ("gpu0", "gpu1"):
            (folder / name).touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        host, ports = socket.gethostname().partition(".")[0], free_ports(3)
        text = CONFIG.format(folder=folder, host=host, user=getpass.getuser(), ports=ports)
        (folder / "slurm.conf").write_text(text)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "SLURM"))}
        path = f"{kept['PATH']}:/usr/sbin"
        made = Slurm(folder, kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path})
        try:
            _start(made)
            yield made
        finally:
            _stop(folder)


def _start(made: Slurm) -> None:
    folder = made.folder
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    files = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munged.pid"}
    files |= {"log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}
    made("munged", *(f"--{name}={file}" for name, file in files.items()))
    made("slurmctld")
    for node in NODES:
        made("slurmd", "-N", node)
    until(lambda: made("sinfo", "--noheader", "--format=%T %D") == f"idle {len(NODES)}", 30, lambda: made("sinfo"))


def _stop(folder: Path) -> None:
    for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
        with suppress(OSError, ValueError, psutil.Error):
            daemon = psutil.Process(int((folder / f"{name}.pid").read_text()))
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(20)  # which writes files until then
    for process in with_variable("SLURM_CONF", str(folder / "slurm.conf")):  # a job that a failed test left
        with suppress(psutil.Error):
            process.kill()
