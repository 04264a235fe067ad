"""`sweep submit`: a sweep as a job of a Ray cluster. The three packages and the configuration travel, nothing else."""

import asyncio
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.errors import reason
from sweep.config.files import write
from sweep.config.resolve import absolute
from sweep.config.schema import Config
from sweep.execution.cluster import ClusterError
from sweep.tracking.access import given_uri

PACKAGES = ("data", "model", "sweep")
SOURCES = ("*.py", "*.yaml", "*.j2")
STOP_SECONDS = 90  # between the signal and the end of a job that is stopped: time for a checkpoint
AGAIN = 3.0  # seconds between two tries to follow a log
Write = Callable[[str], None]


def stage(config: Config, folder: Path) -> None:
    """Put together what travels: sources, and the configuration with absolute paths."""
    root = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        for pattern in SOURCES:
            for source in (root / package).rglob(pattern):
                target = folder / source.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    write(absolute(config), folder / "sweep.yaml")


def connect(address: str | None) -> Any:
    """A client of the cluster's job server; token and address as Ray finds them.

    Raises:
        ClusterError: there is none.
    """
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        shown = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "no address"
        raise ClusterError(
            f"{shown}: no job server answers ({reason(error)}); give --address http://HEAD:8265, and a token if it "
            "wants one"
        ) from None


def start(client: Any, config: Config, staged: Path, out: Path) -> str:
    """Submit the sweep.

    Returns:
        Id of the job.
    """
    return str(
        client.submit_job(
            entrypoint=f"python -m sweep run sweep.yaml --out {shlex.quote(str(out))}",
            submission_id=f"{config.name}-{int(time.time())}",
            runtime_env={"working_dir": str(staged), "env_vars": _variables()},
        )
    )


def _variables() -> dict[str, str]:
    """Environment of the job. Everybody who sees the cluster sees it; secrets lie in the environment of its nodes."""
    found = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"}
    return found | ({"MLFLOW_TRACKING_URI": uri} if (uri := given_uri()) else {})


def follow(client: Any, job: str, write: Write) -> int | None:
    """Write the job's log as it grows, until the job ends; a connection that is lost is made again.

    Returns:
        The exit code of the job's command; None: it was stopped.
    """
    from ray.job_submission import JobStatus

    log = _Log(write)
    while True:
        try:
            asyncio.run(log.tail(client, job))
            info = client.get_job_info(job)
            if info.status.is_terminal():
                log.take(client.get_job_logs(job))  # the stream may end before the last lines
            if info.status == JobStatus.STOPPED:
                return None
            if info.status.is_terminal():
                return int(info.driver_exit_code or info.status == JobStatus.FAILED)
        except (RuntimeError, OSError) as error:  # what aiohttp and requests raise is an OSError, too
            write(f"[connection lost ({reason(error)}); the job goes on, trying again]\n")
        time.sleep(AGAIN)


class _Log:
    """A log that is sent from its start again with every connection, and is written once."""

    def __init__(self, write: Write) -> None:
        self.write, self.written = write, 0

    async def tail(self, client: Any, job: str) -> None:
        seen = 0
        async for text in client.tail_job_logs(job):
            self.take(text, seen)
            seen += len(text)

    def take(self, text: str, start: int = 0) -> None:
        """A part of the log that begins after so many characters."""
        fresh = text[max(0, self.written - start) :]
        if fresh:
            self.write(fresh)
            self.written = start + len(text)
