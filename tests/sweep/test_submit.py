"""`sweep submit`: what is sent to the cluster, what the job's environment holds, and how its log is followed."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from data.errors import UserError
from sweep.cli import submit
from sweep.cli.run import _leave_ray_package
from sweep.config.files import load
from tests.sweep.common import settings, sweep

ROOT = Path(submit.__file__).resolve().parents[2]


def test_stage_copies_packages_and_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    config = settings().with_values({"data.shards": "shards"})
    submit.stage(config, staged := tmp_path / "staged")
    files = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in submit.PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".j2")
    }
    assert files == sources | {"sweep.yaml"}
    assert "sweep/runner.py" in files
    assert load(str(staged / "sweep.yaml")) == config.with_values({"data.shards": str(tmp_path / "shards")})
    assert sum(path.stat().st_size for path in staged.rglob("*") if path.is_file()) < 2e6


class Client:
    """A job server whose connection is lost twice."""

    def __init__(self, status: JobStatus, code: int | None = None) -> None:
        self.status, self.code, self.tails, self.job = status, code, 0, dict[str, Any]()

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
def test_follow_writes_each_line_once_after_reconnecting(
    status: JobStatus, code: int | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "RETRY_SECONDS", 0.0)
    written: list[str] = []
    assert submit.follow(Client(status, code), "job-1", written.append) == expected
    log = "".join(text for text in written if not text.startswith("["))
    assert log == "one\ntwo\nthree\nand the last line\n"
    assert sum(text.startswith("[connection lost") for text in written) == 2


def test_job_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(JobStatus.SUCCEEDED)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    submit.start(client, settings(), tmp_path, Path("/shared/run"))
    assert "s3cret" not in repr(client.job)
    assert client.job["runtime_env"]["env_vars"]["MLFLOW_TRACKING_URI"] == "http://server:5000"
    assert client.job["entrypoint"].endswith("--out /shared/run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@server:5000")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        submit.start(client, settings(), tmp_path, Path("/shared/run"))
    assert "s3cret" not in str(caught.value)


def test_submit_reports_mistakes_before_it_sends(here: Path) -> None:
    relative = sweep("submit", "good.yaml", "--out", "runs/x")
    assert (relative.code, "absolute" in relative.err) == (2, True)
    absent = sweep("submit", "good.yaml", "--out", here / "x", "--address", "http://127.0.0.1:9")
    assert (absent.code, absent.err.startswith("error: http://127.0.0.1:9: no job server answers")) == (1, True)
    assert not (here / "x").exists()


def test_job_leaves_the_folder_that_ray_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node of the same machine may unpack it again, which would remove this process's current folder."""
    package = tmp_path / "_ray_pkg_1"
    (package / "shards").mkdir(parents=True)
    for shards, leaves in ((str(package / "shards"), True), ("shards", False)):
        monkeypatch.chdir(package)
        _leave_ray_package(settings().with_values({"data.shards": shards}))
        assert (Path.cwd() != package) == leaves
    monkeypatch.chdir(tmp_path)
    _leave_ray_package(settings())
    assert Path.cwd() == tmp_path
