"""The lease: one driver per sweep, on one machine or on several; dead holders are replaced, living ones never."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from sweep.durability import heartbeat, lease
from sweep.durability.heartbeat import Holder, boot_id
from sweep.durability.lease import FILE, LOCK, Lease, LeaseFile, LeaseHeldError, LeaseLostError, hold
from tests.sweep.common import tree

BEAT, PATIENCE = 0.02, 0.6  # a busy machine may delay a thread by a good part of a second
FAST: dict[str, Any] = {"beat": BEAT, "patience": PATIENCE, "settle": 0.05}
HOLD = """
import sys, time
from pathlib import Path
from sweep.durability.lease import hold
with hold(Path(sys.argv[1]), beat=0.1):
    print("held", flush=True)
    time.sleep(600)
"""


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_text())


def leave(folder: Path, **values: Any) -> Holder:
    """Write the lease of a driver on another machine."""
    holder = replace(Holder("their-token", "elsewhere", "another-boot", 4242, 1.0, time.time() - 600), **values)
    (folder / FILE).write_text(json.dumps(asdict(holder)))
    return holder


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def refused(folder: Path, match: str, **timing: Any) -> None:
    with pytest.raises(LeaseHeldError, match=match), hold(folder, **(FAST | timing)):
        pass


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, this process is on another machine, which its file locks do not reach."""

    def go() -> None:
        monkeypatch.setattr(heartbeat, "boot_id", lambda: "elsewhere-boot")
        monkeypatch.setattr(lease, "LOCK", ".lock-elsewhere")

    return go


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another driver of this machine."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_lease_names_its_holder_beats_and_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with hold(folder, **FAST) as held:
        first = content(folder)
        process = psutil.Process()
        assert (first["pid"], first["started"]) == (process.pid, process.create_time())
        until(lambda: content(folder)["beat"] >= first["beat"] + 3)
        assert {key for key, value in content(folder).items() if value != first[key]} == {"beat"}
        held.check()
        refused(folder, rf"another `sweep run` .*\(host .*, process {os.getpid()}, for 0 min\); wait", patience=600)
        held.check()
    assert not held.is_alive()
    assert set(tree(folder)) <= {LOCK}


def test_error_releases_the_lease(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hold(tmp_path, **FAST):
        raise KeyboardInterrupt
    assert set(tree(tmp_path)) <= {LOCK}
    with hold(tmp_path, **FAST):
        pass


def test_killed_driver_of_this_machine_is_replaced(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    """At once, though it does not answer while it is suspended."""
    other.send_signal(signal.SIGSTOP)
    refused(tmp_path, f"process {other.pid}")
    other.kill()
    other.wait()
    assert content(tmp_path)["pid"] == other.pid, "a kill leaves the file"
    with hold(tmp_path, patience=600, settle=0.05):
        assert content(tmp_path)["pid"] == os.getpid()


def test_reused_pid_is_not_the_driver(tmp_path: Path) -> None:
    """A container that was started again has the same host name and the same pids."""
    leave(tmp_path, host=socket.gethostname(), boot=boot_id(), pid=os.getppid(), started=1.0)
    with hold(tmp_path, patience=600, settle=0.05) as held:
        held.check()


def test_live_process_without_file_lock_keeps_the_lease(tmp_path: Path) -> None:
    """File locks do nothing on some network file systems."""
    parent, host = psutil.Process(os.getppid()), socket.gethostname()
    leave(tmp_path, host=host, boot=boot_id(), pid=parent.pid, started=parent.create_time())
    refused(tmp_path, f"host {host}, process {parent.pid}, for 10 min")
    assert content(tmp_path)["token"] == "their-token"


@pytest.mark.parametrize("where", ["machine", "container"])
def test_silent_driver_elsewhere_is_replaced_later(where: str, tmp_path: Path) -> None:
    """A container has pids of its own under the same kernel; a clock that is far ahead does not matter."""
    leave(tmp_path, since=time.time() + 1e6, beat=7, **({"boot": boot_id()} if where == "container" else {}))
    lines: list[str] = []
    started = time.monotonic()
    with hold(tmp_path, **FAST, say=lines.append):
        assert time.monotonic() - started >= PATIENCE
        assert content(tmp_path)["pid"] == os.getpid()
    assert len(lines) == 1
    assert "host elsewhere, process 4242" in lines[0]


def test_beating_driver_elsewhere_keeps_the_lease(tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    with hold(tmp_path, **FAST) as held:
        elsewhere()
        for _ in range(2):
            refused(tmp_path, f"process {os.getpid()}")
        held.check()


def test_suspended_driver_notices_its_replacement(tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    with hold(tmp_path, beat=600) as suspended:  # no heartbeat while the other one watches
        elsewhere()
        with hold(tmp_path, **FAST) as held:
            with pytest.raises(LeaseLostError, match=f"took this sweep over .*process {os.getpid()}.*stops writing"):
                suspended.check()
            held.check()
    with pytest.raises(LeaseLostError):
        suspended.check()


@pytest.mark.parametrize("taken", [True, False])
def test_lost_lease_is_not_taken_back(taken: bool, tmp_path: Path) -> None:
    """Neither from another holder, nor if its file was removed."""
    with hold(tmp_path, **FAST) as held:
        theirs = asdict(leave(tmp_path)) if taken else (tmp_path / FILE).unlink()
        until(held.heartbeat.lost.is_set)
        with pytest.raises(LeaseLostError):
            held.check()
        time.sleep(3 * BEAT)
    assert (content(tmp_path) if taken else set(tree(tmp_path)) - {LOCK}) == (theirs or set())


def test_unreachable_file_system_loses_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Any) -> None:
        raise OSError(116, "Stale file handle")

    with hold(tmp_path, **FAST) as held:
        with monkeypatch.context() as patch:
            patch.setattr(LeaseFile, "read", away)
            time.sleep(3 * BEAT)
            held.check()
        assert not held.heartbeat.lost.is_set()
        beat = content(tmp_path)["beat"]
        until(lambda: content(tmp_path)["beat"] > beat)


@pytest.mark.parametrize("left", ["nothing", "dead", "damaged"])
def test_one_of_many_machines_gets_the_lease(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file lock reaches from one to another, and each has a kernel of its own."""
    monkeypatch.setattr(lease, "FileLock", lambda path: FileLock(f"{path}-{threading.get_ident()}"))
    monkeypatch.setattr(heartbeat, "boot_id", lambda: str(threading.get_ident()))
    if left == "dead":
        leave(tmp_path)
    if left == "damaged":
        (tmp_path / FILE).write_text("{")
    together, ended = threading.Barrier(8), threading.Event()
    held: list[Lease] = []
    refusals: list[LeaseHeldError] = []

    def start() -> None:
        together.wait()
        try:
            with hold(tmp_path, beat=BEAT, patience=PATIENCE, settle=0.5) as taken:
                held.append(taken)
                ended.wait(10)
        except LeaseHeldError as error:
            refusals.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(held) + len(refusals) == 8)
    assert len(held) == 1
    held[0].check()
    ended.set()
    for thread in threads:
        thread.join()


def test_only_abandoned_unfinished_files_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / f"{FILE}.unfinished-1", tmp_path / "sweep-id.unfinished-2"
    for path in (old, young):
        path.write_text("half")
    past = time.time() - 2 * lease.ABANDONED
    os.utime(old, (past, past))
    with hold(tmp_path, **FAST):
        assert (old.exists(), young.exists()) == (False, True)
