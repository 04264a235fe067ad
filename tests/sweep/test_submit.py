"""A sweep as a job: what travels, what is told to the cluster, and how its log is followed."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from data.errors import UserError
from sweep.cli import submit
from sweep.cli.run import _leave_package
from sweep.cli.submit import PACKAGES, follow, stage, start
from sweep.config.files import load
from tests.sweep.common import settings, sweep

ROOT = Path(submit.__file__).resolve().parents[1]


def test_the_packages_and_the_configuration_travel_and_nothing_else(tmp_path: Path) -> None:
    config = settings()
    stage(config, tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".j2")
    }
    assert found == sources | {"sweep.yaml"}
    assert load(str(tmp_path / "sweep.yaml")) == config
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2e6


def test_local_paths_travel_as_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    stage(settings().with_values({"data.shards": "shards"}), tmp_path / "staged")
    assert load(str(tmp_path / "staged/sweep.yaml")).data.shards == str(tmp_path / "shards")


class Client:
    """A job server whose connection is lost twice."""

    def __init__(self, status: JobStatus, code: int | None) -> None:
        self.status, self.code, self.tails, self.job = status, code, 0, {}

    def submit_job(self, **job: Any) -> str:
        self.job = job
        return "job-1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.tails += 1
        yield "one\n"
        if self.tails == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield "two\nth"
        if self.tails == 2:
            raise ConnectionResetError("gone")
        yield "ree\n"

    def get_job_logs(self, job: str) -> str:
        return "one\ntwo\nthree\nand the last line\n"

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=self.status, driver_exit_code=self.code)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.STOPPED, None, None),
        (JobStatus.FAILED, 75, 75),
        (JobStatus.FAILED, None, 1),
    ],
)
def test_a_log_is_followed_through_lost_connections(
    status: JobStatus, code: int | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "AGAIN", 0.0)
    written: list[str] = []
    assert follow(Client(status, code), "job-1", written.append) == expected
    own = "".join(text for text in written if not text.startswith("["))
    assert own == "one\ntwo\nthree\nand the last line\n"
    assert sum(text.startswith("[connection lost") for text in written) == 2


def test_no_secret_is_in_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(JobStatus.SUCCEEDED, 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    start(client, settings(), tmp_path, Path("/shared/run"))
    assert "s3cret" not in repr(client.job)
    assert client.job["runtime_env"]["env_vars"]["MLFLOW_TRACKING_URI"] == "http://server:5000"
    assert client.job["entrypoint"].endswith("--out /shared/run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@server:5000")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        start(client, settings(), tmp_path, Path("/shared/run"))
    assert "s3cret" not in str(caught.value)


def test_mistakes_are_told_before_anything_travels(here: Path) -> None:
    relative = sweep("submit", "good.yaml", "--out", "runs/x")
    assert (relative.code, "absolute" in relative.err) == (2, True)
    nobody = sweep("submit", "good.yaml", "--out", here / "x", "--address", "http://127.0.0.1:9")
    assert (nobody.code, nobody.err.startswith("error: http://127.0.0.1:9: no job server answers")) == (1, True)
    assert not (here / "x").exists()


def test_a_job_does_not_stay_where_ray_unpacked_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node of the same machine may unpack it again, and this process would have no current folder."""
    package = tmp_path / "_ray_pkg_1"
    (package / "shards").mkdir(parents=True)
    for shards, leaves in ((str(package / "shards"), True), ("shards", False)):
        monkeypatch.chdir(package)
        _leave_package(settings().with_values({"data.shards": shards}))
        assert (Path.cwd() != package) == leaves
    monkeypatch.chdir(tmp_path)
    _leave_package(settings())
    assert Path.cwd() == tmp_path
