"""The cluster that `sweep run` starts by itself: it uses the CPUs that it may, and strangers do not get in."""

import json
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sweep.execution.cluster import private_token, write_token

CLUSTER = """
import json, os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from sweep.execution.cluster import local_or_remote_ray
with local_or_remote_ray():
    import os, ray
    from ray._private.worker import get_dashboard_url
    address, token = ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN_PATH"]
    found = {"address": address, "dashboard": get_dashboard_url(), "token": token}
    found["cpus"] = ray.cluster_resources()["CPU"]
    print(json.dumps(found), flush=True)
    sys.stdin.read()
"""
CLIENT = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print(len(ray.nodes()))"
PRIVATE = ("/api/version", "/api/jobs/", "/api/cluster_status", "/nodes?view=summary", "/api/v0/actors")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return kept | {"HOME": str(home)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, Any]]:
    """Start a cluster for a user without a home folder; yield its addresses, its token and the driver's pid."""
    home = Path("/dev/null")  # which cannot hold files
    command, pipe = [sys.executable, "-c", CLUSTER], subprocess.PIPE
    with subprocess.Popen(command, env=environment(home), stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), "{}")
        yield {**json.loads(line), "pid": process.pid}
        process.communicate("", timeout=120)


def status(url: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return int(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60).status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_http_api_requires_the_token_and_listens_on_loopback(cluster: dict[str, Any]) -> None:
    token = Path(cluster["token"])
    assert (mode(token.parent), mode(token)) == (0o700, 0o600)
    tokens = None, "f" * 64, token.read_text()
    for path in PRIVATE:
        assert [status(f"http://{cluster['dashboard']}{path}", token) for token in tokens] == [401, 403, 200], path
    port = int(cluster["dashboard"].rpartition(":")[2])
    processes = psutil.Process(cluster["pid"]).children(recursive=True)
    sockets = [socket for process in processes for socket in process.net_connections("tcp")]
    listening = [each for each in sockets if each.status == psutil.CONN_LISTEN and each.laddr.port == port]
    assert {each.laddr.ip for each in listening} == {"127.0.0.1"}


@pytest.mark.slow
def test_local_cluster_uses_only_allowed_cpus(cluster: dict[str, Any]) -> None:
    """Those that a batch system gave to this process, not all of the machine."""
    assert cluster["cpus"] == 1


@pytest.mark.slow
def test_joining_requires_the_token(cluster: dict[str, Any], tmp_path: Path) -> None:
    token, pipe = {"RAY_AUTH_MODE": "token"}, subprocess.PIPE
    hasty = {"RAY_gcs_server_request_timeout_seconds": "10"}  # how long it looks for a node
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, cluster["address"]], env=env, stdout=pipe, stderr=pipe, text=True
        )
        for env in (
            environment(tmp_path) | token | hasty | {"RAY_AUTH_TOKEN_PATH": cluster["token"]},
            environment(tmp_path),
            environment(tmp_path) | token | {"RAY_AUTH_TOKEN": "f" * 64},
        )
    ]
    owner, *strangers = [(*client.communicate(timeout=300), client.returncode) for client in clients]
    # With the token, a driver of this machine is let in, and finds no node: the raylet is hidden.
    assert ("AuthenticationError" in owner[1], "No node info found" in owner[1]) == (False, True), owner[1][-2000:]
    for out, err, code in strangers:
        assert (out, code, "AuthenticationError" in err) == ("", 1, True), err[-2000:]


def test_token_is_new_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir(mode=0o700)
        paths.append(write_token(tmp_path / name))
    assert [mode(path) for path in paths] == [0o600, 0o600]
    assert len({path.read_text() for path in paths}) == 2
    assert [len(path.read_text()) for path in paths] == [64, 64]
    assert [list(path.parent.iterdir()) for path in paths] == [[path] for path in paths]


def test_given_token_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere/token")
    with private_token(tmp_path):
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == "/elsewhere/token"
    assert list(tmp_path.iterdir()) == []
