"""The lease: one driver a sweep, on one machine or on two; the dead are replaced, the living never."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from sweep.durability import lease as module
from sweep.durability.lease import FILE, LOCK, Holder, Lease, LeaseHeldError, LeaseLostError, hold
from tests.sweep.common import tree

BEAT, PATIENCE = 0.02, 1.0  # a busy machine may hold a thread up for a good part of a second
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
    """The lease of a driver on another machine."""
    holder = replace(Holder("their-token", "elsewhere", "another-boot", 4242, 1.0, time.time() - 600), **values)
    (folder / FILE).write_text(json.dumps(asdict(holder)))
    return holder


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, this process is on another machine, which its file locks do not reach."""

    def go() -> None:
        monkeypatch.setattr(module, "boot", lambda: "elsewhere-boot")
        monkeypatch.setattr(module, "LOCK", ".lock-elsewhere")

    return go


def test_the_lease_says_who_and_beats_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with hold(folder, **FAST) as lease:
        first = content(folder)
        process = psutil.Process()
        assert (first["pid"], first["started"]) == (process.pid, process.create_time())
        until(lambda: content(folder)["beat"] >= first["beat"] + 3)
        assert {key for key, value in content(folder).items() if value != first[key]} == {"beat"}
        lease.check()
        assert not lease.lost
    assert not any(thread.name == "lease" for thread in threading.enumerate())
    assert set(tree(folder)) <= {LOCK}


def test_an_error_gives_the_lease_back(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hold(tmp_path, **FAST):
        raise KeyboardInterrupt
    assert set(tree(tmp_path)) <= {LOCK}
    with hold(tmp_path, **FAST):
        pass


def test_a_second_driver_of_this_machine_is_refused_at_once(tmp_path: Path) -> None:
    with hold(tmp_path, **FAST) as lease:
        started = time.monotonic()
        message = (
            rf"another `sweep run` .*\(host .*, process {os.getpid()}, since 0 min\); wait for it, or end it first"
        )
        with pytest.raises(LeaseHeldError, match=message), hold(tmp_path):
            pass
        assert time.monotonic() - started < 5
        lease.check()


def test_a_killed_driver_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(LeaseHeldError, match=f"process {other.pid}"), hold(tmp_path):
                pass
        finally:
            other.kill()
    assert content(tmp_path)["pid"] == other.pid, "a kill leaves the file"
    started = time.monotonic()
    with hold(tmp_path, patience=600, settle=0.05):
        assert content(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - started < 10


def test_a_pid_that_is_used_again_is_not_the_driver(tmp_path: Path) -> None:
    """A container that was started again has the same host name, and the same pids."""
    leave(tmp_path, host=socket.gethostname(), boot=module.boot(), pid=os.getppid(), started=1.0)
    with hold(tmp_path, patience=600, settle=0.05) as lease:
        lease.check()


def test_another_container_of_this_kernel_is_watched_as_another_machine_is(tmp_path: Path) -> None:
    leave(tmp_path, boot=module.boot(), pid=2**22 + 1)
    started = time.monotonic()
    with hold(tmp_path, **FAST):
        assert time.monotonic() - started >= PATIENCE


def test_a_living_process_of_this_kernel_is_not_replaced(tmp_path: Path) -> None:
    """Where file locks do nothing, as on some network file systems."""
    parent = psutil.Process(os.getppid())
    here = socket.gethostname()
    leave(tmp_path, host=here, boot=module.boot(), pid=parent.pid, started=parent.create_time())
    with (
        pytest.raises(LeaseHeldError, match=f"host {here}, process {parent.pid}, since 10 min"),
        hold(tmp_path, **FAST),
    ):
        pass
    assert content(tmp_path)["token"] == "their-token"


def test_a_silent_driver_of_another_machine_is_replaced_after_a_while(tmp_path: Path) -> None:
    leave(tmp_path, since=time.time() + 1e6, beat=7)  # its clock is far ahead, which must not matter
    said: list[str] = []
    started = time.monotonic()
    with hold(tmp_path, **FAST, say=said.append):
        assert time.monotonic() - started >= PATIENCE
        assert content(tmp_path)["pid"] == os.getpid()
    assert len(said) == 1
    assert "host elsewhere, process 4242" in said[0]


def test_a_driver_of_another_machine_whose_heart_beats_is_not_replaced(
    tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    with hold(tmp_path, **FAST) as lease:
        elsewhere()
        for _ in range(3):
            with pytest.raises(LeaseHeldError, match=f"process {os.getpid()}"), hold(tmp_path, **FAST):
                pass
        lease.check()


def test_a_driver_that_had_been_suspended_learns_that_it_was_replaced(
    tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    with hold(tmp_path, beat=600) as suspended:  # no heartbeat while the other one watches
        elsewhere()
        with hold(tmp_path, **FAST) as other:
            with pytest.raises(LeaseLostError, match=f"taken over .*process {os.getpid()}.*stops writing"):
                suspended.check()
            assert suspended.lost
            other.check()
    with pytest.raises(LeaseLostError):
        suspended.check()


def test_its_heartbeat_sees_it_too_and_does_not_take_the_lease_back(tmp_path: Path) -> None:
    with hold(tmp_path, **FAST) as lease:
        theirs = leave(tmp_path)
        until(lambda: lease.lost)
        time.sleep(5 * BEAT)
        assert content(tmp_path) == asdict(theirs)
    assert content(tmp_path) == asdict(theirs), "it is not ours to remove"


def test_a_lease_that_is_gone_is_lost(tmp_path: Path) -> None:
    with hold(tmp_path, **FAST) as lease:
        (tmp_path / FILE).unlink()
        until(lambda: lease.lost)
        with pytest.raises(LeaseLostError):
            lease.check()


def test_a_file_system_that_is_away_takes_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise OSError(116, "Stale file handle")

    with hold(tmp_path, **FAST) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_read", away)
            time.sleep(5 * BEAT)
            lease.check()
        assert not lease.lost
        beat = content(tmp_path)["beat"]
        until(lambda: content(tmp_path)["beat"] > beat)


@pytest.mark.parametrize("dead", [False, True], ids=["fresh", "takeover"])
def test_of_many_machines_that_start_together_one_wins(
    dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file lock reaches from one to another, and each has a kernel of its own."""
    monkeypatch.setattr(module, "FileLock", lambda path: FileLock(f"{path}-{threading.get_ident()}"))
    monkeypatch.setattr(module, "boot", lambda: str(threading.get_ident()))
    if dead:
        leave(tmp_path)
    together, ended = threading.Barrier(8), threading.Event()
    held: list[Lease] = []
    refused: list[LeaseHeldError] = []

    def start() -> None:
        together.wait()
        try:
            with hold(tmp_path, beat=BEAT, patience=PATIENCE, settle=0.5) as lease:
                held.append(lease)
                ended.wait(10)
        except LeaseHeldError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(held) + len(refused) == 8)
    assert len(held) == 1
    held[0].check()
    ended.set()
    for thread in threads:
        thread.join()


def test_a_suspended_process_is_alive_on_its_own_machine(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            other.send_signal(signal.SIGSTOP)
            with pytest.raises(LeaseHeldError), hold(tmp_path, **FAST):
                pass
        finally:
            other.kill()


def test_what_is_no_lease_is_replaced(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with hold(tmp_path, **FAST) as lease:
        lease.check()


def test_what_the_dead_were_writing_is_removed_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    old, young = tmp_path / f"{FILE}.unfinished-1", tmp_path / "sweep-id.unfinished-2"
    for path in (old, young):
        path.write_text("half")
    past = time.time() - 2 * module.ABANDONED
    os.utime(old, (past, past))
    with hold(tmp_path, **FAST):
        assert (old.exists(), young.exists()) == (False, True)
