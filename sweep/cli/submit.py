"""`sweep submit`: run a sweep as a job of a Ray cluster, which receives the three packages and the configuration."""

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from data.errors import UserError, reason
from model.checkpoints.fingerprint import ALLOW
from sweep.cli.console import complain, console, print_line
from sweep.cli.options import ConfigArgument, OtherBaseOption, SetOption, TrialsOption
from sweep.cli.run import load_config
from sweep.config.schema import Config
from sweep.execution.signals import ExitCode

if TYPE_CHECKING:
    from ray.job_submission import JobStatus


PACKAGES = ("data", "model", "sweep")
SOURCES = ("*.py", "*.yaml", "*.j2")
STOP_SECONDS = 90  # between the signal and the end of a job that is stopped: time for a checkpoint
CONNECT_SECONDS = 60.0  # for a job server to answer
RECONNECT_SECONDS = 600.0  # without an answer until the command no longer follows the log
RETRY_SECONDS = 3.0  # between two attempts to follow a log


class JobInfo(Protocol):
    """The part of `ray.job_submission.JobDetails` that is used here."""

    status: "JobStatus"
    driver_exit_code: int | None


class JobClient(Protocol):
    """The part of `ray.job_submission.JobSubmissionClient` that is used here."""

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, object]) -> str:
        """Start a job, and return its id."""

    def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        """Yield the log from its start, until the job ends."""

    def get_job_logs(self, job: str) -> str:
        """Return the log so far."""

    def get_job_info(self, job: str) -> JobInfo:
        """Return status and exit code."""


def submit(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="Folder of the sweep: an absolute path that all nodes share.")],
    set_: SetOption = [],  # noqa: B006
    trials: TrialsOption = None,
    address: Annotated[
        str | None, typer.Option(help="Address of the job server; by default that of RAY_API_SERVER_ADDRESS.")
    ] = None,
    allow_other_base: OtherBaseOption = False,
    wait: Annotated[bool, typer.Option(help="Show the job's log until it ends, and exit with its exit code.")] = True,
) -> None:
    """Run a sweep as a job of a Ray cluster.

    Ctrl-C leaves the job running. Rerun the same command to resume the sweep.
    """
    from sweep.execution.cluster import ClusterError

    if not out.is_absolute():
        raise UserError(f"--out {out}: must be an absolute path, on storage that all nodes of the cluster share")
    loaded = load_config(config, set_, trials)
    try:
        client = connect(address)
    except ClusterError as error:
        complain(error)
        sys.exit(ExitCode.INFRASTRUCTURE)
    with tempfile.TemporaryDirectory() as staged:
        stage(loaded, Path(staged))
        job = start(client, loaded, Path(staged), out, allow_other_base)
    print_line(f"job {job}; `ray job stop {job}` stops it after every trial has written a checkpoint")
    if not wait:
        return
    try:
        code = follow(client, job, lambda text: console.out(text, end="", highlight=False))
    except KeyboardInterrupt:
        print_line(f"the job keeps running; `ray job logs --follow {job}` shows its log")
        sys.exit(ExitCode.UNFINISHED)
    sys.exit(ExitCode.UNFINISHED if code is None else code)


def stage(config: Config, folder: Path) -> None:
    """Copy what the job needs into a folder: the sources, and the configuration with absolute paths."""
    from sweep.config.files import write
    from sweep.config.resolve import absolute

    root = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        for pattern in SOURCES:
            for source in (root / package).rglob(pattern):
                target = folder / source.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    write(absolute(config), folder / "sweep.yaml")


def connect(address: str | None) -> JobClient:
    """Return a client of the cluster's job server; Ray looks up the token, and the address if none is given.

    Raises:
        ClusterError: no job server answers.
    """
    from ray.job_submission import JobSubmissionClient

    from sweep.execution.cluster import ClusterError
    from sweep.execution.waiting import within

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        client: JobClient = within(CONNECT_SECONDS, lambda: JobSubmissionClient(address), "connect")
        return client
    except Exception as error:
        name = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "no address"
        raise ClusterError(
            f"{name}: no job server answers ({reason(error)}); give --address http://HEAD:8265, and a token if the "
            "server requires one"
        ) from None


def start(client: JobClient, config: Config, staged: Path, out: Path, allow_other_base: bool = False) -> str:
    """Submit the sweep, and return the id of the job."""
    options = f" {ALLOW}" if allow_other_base else ""
    return client.submit_job(
        entrypoint=f"python -m sweep run sweep.yaml --out {shlex.quote(str(out))}{options}",
        submission_id=f"{config.name}-{int(time.time())}",
        runtime_env={"working_dir": str(staged), "env_vars": job_variables()},
    )


def job_variables() -> dict[str, str]:
    """Return the environment of the job. All users of the cluster see it; secrets belong to its nodes' environment."""
    from sweep.tracking.access import given_uri

    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"}
    return variables | ({"MLFLOW_TRACKING_URI": uri} if (uri := given_uri()) else {})


def follow(client: JobClient, job: str, write: Callable[[str], object]) -> int | None:
    """Write the job's log until the job ends, and reconnect when the connection is lost.

    Every connection sends the log from its start, and it is written once.

    Returns:
        The exit code of the job's command, or None if the job was stopped.

    Raises:
        ClusterError: the job server does not answer any more.
    """
    from ray.job_submission import JobStatus

    from sweep.execution.cluster import ClusterError

    written = 0  # characters

    def take(text: str, start: int) -> None:
        """Write the part of a text that is new; the text begins at a position of the log."""
        nonlocal written
        if fresh := text[max(0, written - start) :]:
            write(fresh)
            written = start + len(text)

    async def tail() -> None:
        position = 0
        async for text in client.tail_job_logs(job):
            take(text, position)
            position += len(text)

    answered = time.monotonic()
    while True:
        try:
            asyncio.run(tail())
            answered = time.monotonic()
            info = client.get_job_info(job)
            if info.status.is_terminal():
                take(client.get_job_logs(job), 0)  # the stream may end before the last lines
                return (
                    None
                    if info.status == JobStatus.STOPPED
                    else int(info.driver_exit_code or info.status == JobStatus.FAILED)
                )
        except (RuntimeError, OSError) as error:  # aiohttp and requests raise subclasses of OSError
            write(f"[connection lost ({reason(error)}); the job keeps running, reconnecting]\n")
            if time.monotonic() - answered > RECONNECT_SECONDS:
                raise ClusterError(
                    f"the job server has not answered for {RECONNECT_SECONDS / 60:.0f} min; `ray job logs {job}` "
                    "shows the job's log once it does"
                ) from None
        time.sleep(RETRY_SECONDS)
