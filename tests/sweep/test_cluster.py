"""The cluster of a sweep: a local one is private to its driver, uses only the CPUs that it may and lets no stranger in.

A driver notices when its cluster goes away.
"""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sweep.execution import cluster as cluster_module
from sweep.execution import joined_cluster
from sweep.execution.cluster import ClusterError, ClusterLostError, RayStart, local_or_remote_ray
from sweep.execution.joined_cluster import ClusterWatch, parse_address
from sweep.execution.orphans import FILE, MARK, cluster_processes, end_orphans
from tests.sweep.cluster import cluster, kill, until

DRIVER = """
import json, os, subprocess, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import ray
from pathlib import Path
from sweep.execution.cluster import local_or_remote_ray
other = subprocess.Popen(["sleep", "600"])  # a child that does not belong to Ray
with local_or_remote_ray(Path(sys.argv[1])) as check:
    square = ray.remote(lambda x: x * x)
    found = {"address": ray.get_runtime_context().gcs_address, "other": other.pid}
    found |= {"token": os.environ["RAY_AUTH_TOKEN_PATH"], "cpus": ray.cluster_resources()["CPU"]}
    print(json.dumps(found), flush=True)
    for line in sys.stdin:
        print(ray.get(square.remote(int(line)), timeout=60), flush=True)
    check()
print("other child", other.poll(), flush=True)
other.kill()
"""
CLIENT = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print(len(ray.nodes()))"
FINDER = "from ray._private.services import find_gcs_addresses; print(*find_gcs_addresses())"
JOINED = """
import functools, sys, time
from sweep.execution.cluster import ClusterLostError, local_or_remote_ray
from sweep.execution import joined_cluster
joined_cluster.CONNECT_SECONDS = float(sys.argv[1])
joined_cluster.ClusterWatch = functools.partial(joined_cluster.ClusterWatch, limit=8)
try:
    with local_or_remote_ray(warn=print) as check:
        import ray
        waits = ray.remote(num_cpus=0)(lambda: time.sleep(600)).remote()
        print("joined", flush=True)
        while True:
            check()
            time.sleep(0.2)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return kept | {"HOME": str(home)}


class Driver:
    """A process with a local cluster of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, pipe = folder, subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder)],
            env=environment(Path("/dev/null")),  # nothing needs a home folder
            stdin=pipe,
            stdout=pipe,
            text=True,
            start_new_session=True,
        )

    @functools.cached_property
    def seen(self) -> dict[str, Any]:
        """Return what it printed of its cluster."""
        return dict(json.loads(self.read()))

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def works(self) -> bool:
        """Return whether its cluster still runs tasks."""
        assert self.process.stdin is not None
        number = random.randrange(1000)
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.read() == str(number * number)

    def recorded(self) -> list[psutil.Process]:
        """Return the living processes that the record of its folder names."""
        record = json.loads((self.folder / FILE).read_text())["processes"]
        return [psutil.Process(int(pid)) for pid in record if psutil.pid_exists(int(pid))]


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Driver]]:
    """Two drivers beside each other, each with one CPU; the test that kills one of them comes last."""
    root = tmp_path_factory.mktemp("drivers")
    running = [Driver(root / name) for name in ("a", "b")]
    yield running
    for driver in running:
        with contextlib.suppress(psutil.NoSuchProcess):  # the test has killed it
            for process in (*psutil.Process(driver.process.pid).children(recursive=True), driver.process):
                process.kill()
        end_orphans(driver.folder)
        driver.process.wait(20)


@pytest.mark.slow
def test_local_cluster_has_a_secret_token_and_no_http_api(drivers: list[Driver]) -> None:
    token = Path(drivers[0].seen["token"])
    assert [stat.S_IMODE(path.stat().st_mode) for path in (token.parent, token)] == [0o700, 0o600]
    processes = psutil.Process(drivers[0].process.pid).children(recursive=True)
    commands = [" ".join(process.cmdline()) for process in processes]
    assert [any(word in command for command in commands) for word in ("gcs_server", "dashboard.py")] == [True, False]


@pytest.mark.slow
def test_local_cluster_uses_only_allowed_cpus(drivers: list[Driver]) -> None:
    """Those that a batch system gave to this process, not all of the machine."""
    assert [driver.seen["cpus"] for driver in drivers] == [1, 1]


@pytest.mark.slow
def test_joining_requires_the_token(drivers: list[Driver], tmp_path: Path) -> None:
    seen, token, pipe = drivers[0].seen, {"RAY_AUTH_MODE": "token"}, subprocess.PIPE
    # How long it looks for a node, and how often it asks.
    hasty = {"RAY_gcs_server_request_timeout_seconds": "2", "RAY_NUM_REDIS_GET_RETRIES": "2"}
    clients = [
        subprocess.Popen([sys.executable, "-c", CLIENT, seen["address"]], env=env, stdout=pipe, stderr=pipe, text=True)
        for env in (
            environment(tmp_path) | hasty | token | {"RAY_AUTH_TOKEN_PATH": seen["token"]},
            environment(tmp_path) | hasty,
            environment(tmp_path) | hasty | token | {"RAY_AUTH_TOKEN": "f" * 64},
        )
    ]
    owner, *strangers = [(*client.communicate(timeout=300), client.returncode) for client in clients]
    # With the token, a driver of this machine is let in, and finds no node: the raylet is hidden.
    assert ("AuthenticationError" in owner[1], "No node info found" in owner[1]) == (False, True), owner[1][-2000:]
    for out, err, code in strangers:
        assert (out, code, "AuthenticationError" in err) == ("", 1, True), err[-2000:]


@pytest.mark.slow
def test_two_local_clusters_never_touch_each_other(drivers: list[Driver]) -> None:
    """Kill one driver; the clean-up of its folder ends its own processes, and nothing of the other or of the user."""
    victim, survivor = drivers
    seen = [driver.seen for driver in drivers]
    found = subprocess.run([sys.executable, "-c", FINDER], capture_output=True, text=True, check=True).stdout.split()
    assert not {each["address"] for each in seen} & set(found)
    until(lambda: any("raylet" in process.name() for process in victim.recorded()), 20, lambda: "the record")
    left = victim.recorded()
    assert seen[0]["other"] not in {process.pid for process in left}
    victim.process.kill()
    assert victim.process.wait(20) == -signal.SIGKILL
    end_orphans(victim.folder)
    assert [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    assert psutil.Process(seen[0]["other"]).is_running()
    psutil.Process(seen[0]["other"]).kill()
    assert survivor.works()
    assert survivor.process.stdin is not None
    survivor.process.stdin.close()
    assert survivor.read() == "other child None"
    assert survivor.process.wait(60) == 0


@pytest.mark.long
def test_clusters_killed_at_random_leave_each_other_alone(tmp_path: Path) -> None:
    """Three times: start two drivers, kill one at a random moment, and start the same one again beside the other."""
    draw = random.Random(3)
    for round_ in range(3):
        pair = [Driver(tmp_path / f"{round_}-{name}") for name in ("a", "b")]
        time.sleep(draw.uniform(0.5, 12))
        pair[0].process.kill()
        end_orphans(pair[0].folder)
        pair.append(Driver(pair[0].folder))
        for driver in pair[1:]:
            assert driver.seen["address"]
            assert driver.works()
            assert driver.process.stdin is not None
            driver.process.stdin.close()
            assert (driver.read(), driver.process.wait(60)) == ("other child None", 0)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A server that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener


def name_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_start_that_is_not_awaited_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an error in the configuration: Ray is still starting, and its processes do not end by themselves."""
    started: list[subprocess.Popen[bytes]] = []

    def start(scratch: Path) -> None:
        started.append(subprocess.Popen(["sleep", "600"]))
        started[0].wait()
        raise OSError("its processes are gone")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster_module, "_start_once", start)
    before, began = set(os.environ), time.monotonic()
    with pytest.raises(ValueError, match="inputs"), RayStart() as ray_start:
        ray_start._begin()
        until(lambda: started, 5, lambda: "the start")
        assert ray_start.scratch is not None
        assert psutil.Process(started[0].pid).environ()[MARK] == str(ray_start.scratch)
        raise ValueError("inputs")
    assert (started[0].poll() is None, ray_start.scratch.exists()) == (False, False)
    assert not (set(os.environ) - before) & {MARK, "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"}
    assert time.monotonic() - began < 4


@pytest.mark.long
@pytest.mark.slow
def test_bad_corpus_ends_a_new_sweep_at_once(tmp_path: Path) -> None:
    """Ray and its workers start while the corpus is checked; none of them is left."""
    words = ["sweep", "run", "demo", "--set", "data.shards=nowhere", "--out", str(tmp_path / "sweep")]
    env = environment(Path.home()) | {"STARTED_BY": str(tmp_path)}
    command = [sys.executable, "-m", *words]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr.count("\n"), (tmp_path / "sweep").exists()) == (2, 1, False), ran.stderr
    environments = (process.info["environ"] or {} for process in psutil.process_iter(["environ"]))
    assert [found for found in environments if found.get("STARTED_BY") == str(tmp_path)] == []


def test_watch_finds_that_a_cluster_is_gone(server: socket.socket) -> None:
    watch = ClusterWatch(name_of(server), [server.getsockname()], every=0.02, limit=0.1)
    watch.start()
    watch.check(after_error=True)
    server.close()
    with pytest.raises(ClusterLostError, match=r"does not answer any more; rerun the same command"):
        watch.check(after_error=True)
    watch.join(20)
    with pytest.raises(ClusterLostError):
        watch.check()


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1"),
        ("head", "not of the form HOST:PORT"),
        ("auto", "no cluster of `ray start` runs on this machine"),
    ],
)
def test_address_without_a_cluster_is_refused_at_once(address: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_cluster, "find_ray_cluster", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS {address}: cannot be reached .{why}"), local_or_remote_ray():
        pass


def test_addresses_are_parsed() -> None:
    assert parse_address("10.0.0.1:6379") == ("10.0.0.1", 6379)
    assert parse_address("ray://head:10001") == ("head", 10001)
    assert parse_address("[::1]:6379") == ("::1", 6379)


def joined(address: str, limit: float, **options: Any) -> "subprocess.Popen[str]":
    """Start a driver that joins a cluster."""
    options["env"] = options.get("env", dict(os.environ)) | {"RAY_ADDRESS": address}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", JOINED, str(limit)], stdout=pipe, stderr=pipe, text=True, **options)


def test_silent_server_is_given_up_and_sigterm_ends_the_wait(server: socket.socket) -> None:
    patient, hasty = joined(name_of(server), 600), joined(name_of(server), 0.5)
    try:
        out, _ = hasty.communicate(timeout=60)
        assert (hasty.returncode, out.startswith("ClusterError RAY_ADDRESS 127.0.0.1:")) == (0, True), out
        assert "no answer within" in out
        patient.send_signal(signal.SIGTERM)
        assert patient.wait(60) == -signal.SIGTERM
    finally:
        for process in (patient, hasty):
            process.kill()
            process.communicate()


@pytest.mark.long  # the long kill harness kills clusters, too
def test_driver_outlives_the_cluster_that_it_joined() -> None:
    """Ray's core would end the process after 60 s, with a message of its own and exit code 1."""
    with cluster(dashboard=False) as made:
        until(lambda: joined_cluster.answers(parse_address(made.address)), 90, lambda: "the cluster")
        process = joined(made.address, 60, env=made.environment)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
            kill(made.nodes[0])
            out, err = process.communicate(timeout=150)
        finally:
            process.kill()
    assert process.returncode == 0, err[-2000:]
    assert out.splitlines()[-1].startswith(f"ClusterLostError the Ray cluster at {made.address} does not answer")


def test_children_of_the_user_are_not_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["sleep", "600"])
    marked = subprocess.Popen(["sleep", "600"], env=dict(os.environ) | {"SWEEP_RAY_SCRATCH": "/tmp/sweep-ray-x"})
    try:
        assert set(cluster_processes(Path("/tmp/sweep-ray-x"))) == {marked.pid}
        assert set(cluster_processes(Path("/tmp/sweep-ray-y"))) == set()
        assert {marked.pid} == set(cluster_processes()) & {child.pid, marked.pid}
    finally:
        for process in (child, marked):
            process.kill()
            process.wait()
