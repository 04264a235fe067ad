"""The mailbox without Ray: what workers and Tune receive, and in which order; and one that is asked to end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import ray

from sweep.execution import mailbox, worker, worker_group
from sweep.execution.cluster import local_or_remote_ray
from sweep.execution.job import TrialJob
from sweep.execution.mailbox import RETRIES, DriverEvents, Events, Mailbox, read_events
from sweep.execution.worker import TrialWorker
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


def test_only_worker_of_a_group_is_free_once_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group takes a worker that the driver has started, if another group has not; one that dies gets a successor."""
    served: list[str] = []
    monkeypatch.setattr(worker, "serve", lambda group: served.append(group["fit"]))
    started, group = TrialWorker("json:loads"), {"fit": "json:loads", "mailbox": None}
    assert [started.serve(group) for _ in range(2)] == [True, False]  # type: ignore[arg-type]
    answers: list[Any] = [False, ray.exceptions.ActorDiedError(), True]
    fresh = Mock()

    def get(_: object) -> bool:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return bool(answer)

    monkeypatch.setattr(worker_group.ray, "get", get)
    monkeypatch.setattr(worker_group.ray, "kill", killed := Mock())
    monkeypatch.setattr(worker_group, "start_worker", fresh)
    run_alone(group, {"CPU": 1}, [Mock()])  # type: ignore[arg-type]
    assert (served, fresh.call_count, killed.call_count, answers) == (["json:loads"], 2, 1, [])


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
