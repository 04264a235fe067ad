"""The mailbox without Ray: what workers and Tune receive, and in which order; and one that is asked to end."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from threading import Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import ray

from sweep.execution import mailbox, worker, worker_group
from sweep.execution.cluster import local_or_remote_ray
from sweep.execution.job import TrialJob
from sweep.execution.mailbox import RETRIES, DriverEvents, Events, Mailbox, read_events
from sweep.execution.worker import NodeDrainingError, TrialWorker, start_worker
from sweep.execution.worker_group import run_alone

JOB = TrialJob("f", "{}", "local", (), None)
make: Callable[[], Any] = Mailbox.__ray_metadata__.modified_class  # type: ignore[attr-defined]


def play(scene: Callable[[Any], Awaitable[None]]) -> None:
    async def timed() -> None:
        await asyncio.wait_for(scene(make()), 5)

    asyncio.run(timed())


def test_report_returns_once_tune_asks_for_more() -> None:
    async def scene(box: Any) -> None:
        version = await box.assign(JOB)
        assert await box.next(0, 0) == (version, JOB)
        report = asyncio.ensure_future(box.report(version, 1, {"loss": 1.0}))
        assert (await box.take(version))["epoch"] == 1
        await asyncio.sleep(0)
        assert not report.done()
        more = asyncio.ensure_future(box.take(version))
        assert await report is True
        await box.done(version)
        assert (await more)["finished"]

    play(scene)


def test_stop_lets_the_trial_write_its_checkpoint() -> None:
    async def scene(box: Any) -> None:
        version = await box.assign(JOB)
        await box.next(0, 0)
        await box.stop()
        await box.stopped()
        taken = asyncio.ensure_future(box.take(version))
        await asyncio.sleep(0)
        assert not taken.done()  # it waits for the worker
        assert await box.interrupted(version) is True
        assert (await taken)["interrupted"]
        await box.interrupted(version)  # of another rank: reported once
        assert not box.out

    play(scene)


@pytest.mark.parametrize("before", [True, False])
def test_trial_without_worker_ends_at_once(before: bool) -> None:
    async def scene(box: Any) -> None:
        if before:
            await box.stop()
        version = await box.assign(JOB)
        if not before:
            await box.stop()
        assert (await box.take(version))["interrupted"]

    play(scene)


def test_draining_node_is_no_failure() -> None:
    async def scene(box: Any) -> None:
        version = await box.assign(JOB)
        for _ in range(3 * RETRIES):
            assert await box.next(0, 0) == (version, JOB)
            assert await box.interrupted(version) is False
        assert not box.out

    play(scene)


def test_workers_that_keep_dying_fail_the_trial() -> None:
    async def scene(box: Any) -> None:
        version = await box.assign(JOB)
        for _ in range(1 + RETRIES):
            await box.next(0, 0)
        with pytest.raises(RuntimeError, match="died too often"):
            await box.next(0, 0)
        result = await box.take(version)
        assert (result["reason"], result["common"]) == ("workers lost", False)

    play(scene)


def test_new_epoch_resets_the_restarts() -> None:
    async def scene(box: Any) -> None:
        version = await box.assign(JOB)
        for epoch in range(1, 4):
            for _ in range(RETRIES):
                await box.next(0, 0)
            report = asyncio.ensure_future(box.report(version, epoch, {}))
            assert (await box.take(version))["epoch"] == epoch
            report.cancel()

    play(scene)


def test_failure_is_reported_once() -> None:
    async def scene(box: Any) -> None:
        version = await box.assign(JOB)
        await box.next(0, 0)
        await box.fail(version, "a peer died", final=False)
        assert not box.out
        await box.fail(version, "no such shard", final=True, reason="bad data", common=True)
        await box.fail(version, "again", final=True)
        result = await box.take(version)
        assert result == {"failed": "no such shard", "reason": "bad data", "common": True, "done": True}
        assert not box.out

    play(scene)


def test_closing_ends_workers_and_waiting_calls() -> None:
    async def scene(box: Any) -> None:
        version = await box.assign(JOB)
        await box.next(0, 0)
        waiting = [asyncio.ensure_future(box.next(version, 0)), asyncio.ensure_future(box.stopped())]
        report = asyncio.ensure_future(box.report(version, 1, {}))
        await asyncio.sleep(0)
        await box.close()
        assert await report is False
        assert await waiting[0] is None
        await waiting[1]
        assert await box.interrupted(version) is True  # not a draining node

    play(scene)


def test_driver_tells_all_groups_the_newest_events(monkeypatch: pytest.MonkeyPatch) -> None:
    store: dict[str, bytes] = {}
    monkeypatch.setattr(mailbox, "store_value", store.__setitem__)
    monkeypatch.setattr(mailbox, "read_value", store.get)
    monkeypatch.setattr(mailbox, "forget_value", store.pop)
    monkeypatch.setattr(mailbox, "Work", lambda work, name: work())
    events = DriverEvents()
    assert read_events(events.key) == Events()
    for version in (2, 1):
        events.announce(version)
        assert read_events(events.key) == Events(version=2)
    events.stop()
    assert read_events(events.key) == Events(stopping=True, version=2)
    events.close()
    assert store == {}


def test_worker_serves_one_group_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    group, free = {"fit": "json:loads", "mailbox": None}, []
    started = TrialWorker("json:loads")
    monkeypatch.setattr(worker, "serve", lambda group: free.append(started.serve(group)))  # a second group asks then
    assert [started.serve(group) for _ in range(2)] == [True, True]  # type: ignore[arg-type]
    assert free == [False, False]


UNAVAILABLE = ray.exceptions.ActorUnavailableError("restarting", b"0" * 16)
RAISED = ray.exceptions.RayTaskError("serve", "traceback", NodeDrainingError("leaves"))
DIED = ray.exceptions.ActorDiedError()


@pytest.mark.parametrize(
    ("early", "answers", "rounds", "starts", "kills"),
    [
        (2, [False, False, UNAVAILABLE, False, RAISED, True], 2, 0, [False]),
        (0, [DIED, UNAVAILABLE, RAISED, True], 3, 4, [True, True]),
    ],
)
def test_group_gets_a_worker(
    monkeypatch: pytest.MonkeyPatch, early: int, answers: list[Any], rounds: int, starts: int, kills: list[bool]
) -> None:
    """A group waits for a worker that the driver has started, also while it restarts; elsewhere it starts its own."""
    monkeypatch.setattr(worker_group, "FREE_LOOK", 0)
    looks, ready = [], Mock()
    box = SimpleNamespace(__ray_ready__=ready)

    def get(reference: object) -> object:
        if reference is ready.remote.return_value:
            return looks.append(reference)
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(worker_group.ray, "get", get)
    monkeypatch.setattr(worker_group.ray, "kill", killed := Mock())
    monkeypatch.setattr(worker_group, "start_worker", fresh := Mock())
    run_alone({"fit": "json:loads", "mailbox": box}, {"CPU": 1}, [Mock() for _ in range(early)])
    assert (answers, len(looks)) == ([], rounds)
    assert fresh.call_count == starts
    assert [call.kwargs.get("no_restart", True) for call in killed.call_args_list] == kills


def test_worker_that_cannot_start_ends_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group.ray, "get", Mock(side_effect=DIED))
    with pytest.raises(ray.exceptions.ActorDiedError):
        run_alone({"fit": "json:loads"}, {"CPU": 1}, [Mock()])  # type: ignore[typeddict-item]


@pytest.mark.long  # `python -m tests.kill` ends mailboxes under a sweep, too
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mailbox_process_ends_on_term() -> None:
    """Ray by itself would wait for the pending calls, and so would every process that waits for an answer."""
    with local_or_remote_ray():
        box = Mailbox.remote()  # type: ignore[attr-defined]
        version = ray.get(box.assign.remote(JOB))
        waiting = [box.take.remote(version), box.stopped.remote()]
        children = psutil.Process().children(recursive=True)
        [process] = [child for child in children if "Mailbox" in " ".join(child.cmdline())]
        process.terminate()
        for reference in waiting:
            with pytest.raises(ray.exceptions.RayActorError):
                ray.get(reference, timeout=20)


def trains(*_: object) -> bool:
    """Stand for a trial that trains to its end."""
    return True


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_groups_that_end_or_die_give_their_worker_back() -> None:
    """All CPUs belong to two workers, so a worker that is lost to a group that is gone would stop the sweep."""
    threads: list[Thread] = []

    def group() -> Any:
        box = Mailbox.remote()  # type: ignore[attr-defined]
        arguments = {"fit": "tests.sweep.test_mailbox:trains", "mailbox": box}, {"CPU": 1.0}, workers
        threads.append(Thread(target=run_to_the_end, args=arguments, daemon=True))
        threads[-1].start()
        return box

    def run_to_the_end(*arguments: Any) -> None:
        with contextlib.suppress(ray.exceptions.ActorDiedError):
            run_alone(*arguments)

    def works(box: Any) -> bool:
        version = ray.get(box.assign.remote(JOB))
        return bool(ray.get(box.take.remote(version), timeout=60)["finished"])

    with local_or_remote_ray():
        half = ray.cluster_resources()["CPU"] / 2
        workers = [start_worker("tests.sweep.test_mailbox:trains", {"CPU": half}, restarts=-1) for _ in range(2)]
        boxes = [group(), group()]
        for end in ("close", "die", "workers killed"):
            assert all(works(box) for box in boxes)
            third = group()
            version = ray.get(third.assign.remote(JOB))
            taken = third.take.remote(version)
            assert ray.wait([taken], timeout=2)[0] == []
            if end == "workers killed":
                for process in psutil.Process().children(recursive=True):
                    if "ray::TrialWorker" in " ".join(process.cmdline()):
                        process.kill()
            first = boxes.pop(0)
            if end == "die":
                ray.kill(first)
            else:
                ray.get(first.close.remote())
            assert ray.get(taken, timeout=60)["finished"]
            boxes.append(third)
        ray.get([box.close.remote() for box in boxes])
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
