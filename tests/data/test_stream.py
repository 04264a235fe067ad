"""Sources and prefetching: equal examples through Ray and locally, in order, with errors and without waste."""

import contextlib
import pickle
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError

from data.config import DataConfig
from data.errors import DataError
from data.loading import ray_source as module
from data.loading.examples import clips_from_arrow, clips_to_arrow
from data.loading.prefetch import BURST, PREFETCH, Prefetcher
from data.loading.ray_source import FIRST_STEPS, STEPS_PER_TASK, ray_source
from data.loading.sources import local_source
from data.loading.tasks import items
from data.shards.dataset import Shards
from data.shards.store import Store
from tests.data.common import make, same

TASKS = ("classify", "forecast", "response", "quality")


def as_lists(table: pa.Table) -> list[list[int] | None]:
    return [None if clip is None else clip.tolist() for clip in clips_from_arrow(table)]


def test_clips_survive_arrow() -> None:
    clips = [np.arange(-3, 4, dtype="<i2"), None, np.array([9], "<i2")]
    for part in (clips, clips[1:2], []):
        assert as_lists(clips_to_arrow(part)) == [None if clip is None else clip.tolist() for clip in part]
    joined = pa.concat_tables([clips_to_arrow(clips), clips_to_arrow(clips[2:])]).slice(2)
    assert as_lists(joined) == [[9], [9]]


def test_read_tasks_share_their_memory() -> None:
    long, short = module._memory(1000), module._memory(10)
    assert (len(long), len(short)) == (1000, 10)
    assert np.shares_memory(long, short)


def test_both_sources_give_the_same_examples(corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a control, and if Ray cuts and joins its blocks at other positions."""

    def run_here(tasks: Any) -> Iterator[Any]:
        tables = [table for task in tasks for table in task()]
        assert len(tables) == len(tasks) > 1
        yield from clips_from_arrow(pa.concat_tables(tables))

    monkeypatch.setattr(module, "_clips", run_here)
    chosen = [items(corpus, task, "train")[0] for task in TASKS]
    for config in (DataConfig(history=4), DataConfig(history=1, sound="shuffled", last_text="omitted")):
        for with_audio in (True, False):
            batches = [chosen[:3], [], chosen[3:], items(corpus, "classify", "val")[:9]] * FIRST_STEPS
            local, ray = (list(source(corpus, config, with_audio)(batches)) for source in (local_source, ray_source))
            assert [len(batch) for batch in ray] == [len(batch) for batch in batches]
            for batch in zip(local, ray, strict=True):
                assert all(same(*pair) for pair in zip(*batch, strict=True))
            assert all((example.pcm is not None) == with_audio for batch in ray for example in batch)


def test_text_is_read_without_ray(corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "_clips")
    [batch] = ray_source(corpus, DataConfig(), False)([items(corpus, "classify", "val")])
    assert batch
    assert all(example.pcm is None for example in batch)


def numbers(read: list[int], count: int = 100) -> Generator[list[Any], None, None]:
    """Yield numbered batches; `read` records which were read."""
    for number in range(count):
        read.append(number)
        yield [number]


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_prefetcher_yields_every_batch_in_order() -> None:
    assert list(Prefetcher(lambda: numbers([]))) == [[number] for number in range(100)]
    assert list(Prefetcher(lambda: numbers([], 0))) == []
    prefetcher = Prefetcher(lambda: numbers([], 1))
    assert [*prefetcher, *prefetcher] == [[0]]  # it does not start again


def test_prefetcher_reads_ahead_up_to_its_limit() -> None:
    read: list[int] = []
    prefetcher = Prefetcher(lambda: numbers(read))
    assert until(lambda: len(read) == PREFETCH)
    time.sleep(0.05)
    assert len(read) == PREFETCH
    assert [next(prefetcher) for _ in range(BURST)] == [[number] for number in range(BURST)]
    assert until(lambda: len(read) == PREFETCH + BURST)


def test_prefetcher_measures_waiting_time() -> None:
    def slow() -> Generator[list[Any], None, None]:
        time.sleep(0.2)
        yield [1]

    prefetcher = Prefetcher(slow)
    assert list(prefetcher) == [[1]]
    assert prefetcher.waited > 0.1


def test_prefetcher_starts_after_another_or_when_needed() -> None:
    first, second = list[int](), list[int]()
    earlier = Prefetcher(lambda: numbers(first))
    later = Prefetcher(lambda: numbers(second), after=earlier)
    assert until(lambda: len(first) == PREFETCH)
    time.sleep(0.1)
    assert second == []
    assert next(later) == [0]  # no deadlock behind a prefetcher that is not consumed
    assert len(list(earlier)) == 100
    second.clear()
    later = Prefetcher(lambda: numbers(second), after=earlier)
    assert until(lambda: len(second) == PREFETCH)


def test_error_is_raised_at_the_missing_batch() -> None:
    error = DataError("shard-0.arrow: the file is missing")

    def broken() -> Generator[list[Any], None, None]:
        yield from numbers([], 2)
        raise error

    prefetcher = Prefetcher(broken)
    assert until(lambda: prefetcher.ended)
    assert [next(prefetcher), next(prefetcher)] == [[0], [1]]
    with pytest.raises(DataError) as raised:
        next(prefetcher)
    assert raised.value is error
    assert list(prefetcher) == []


@pytest.mark.parametrize("taken", [0, 50])
@pytest.mark.parametrize("end", ["closed", "dropped", "exception"])
def test_abandoned_prefetcher_ends_thread_and_source(taken: int, end: str) -> None:
    read: list[int] = []
    ended = threading.Event()

    def source() -> Generator[list[Any], None, None]:
        try:
            yield from numbers(read)
        finally:
            ended.set()

    def train() -> None:
        for number, _ in enumerate(Prefetcher(source), start=1):
            if number > taken:
                raise KeyError

    if end == "exception":
        with contextlib.suppress(KeyError):
            train()
    else:
        prefetcher = Prefetcher(source)
        thread = prefetcher.thread
        for _ in range(taken):
            next(prefetcher)
        if end == "closed":
            prefetcher.close()
            assert list(prefetcher) == []
        else:
            del prefetcher
        thread.join(5)
        assert not thread.is_alive()
    assert ended.wait(5)
    assert len(read) < 100


def test_close_does_not_wait_for_the_current_batch() -> None:
    finish, started = threading.Event(), threading.Event()

    def stuck() -> Generator[list[Any], None, None]:
        started.set()
        finish.wait(10)
        yield [0]

    reading = Prefetcher(stuck)
    waiting = Prefetcher(lambda: numbers([]), after=reading)
    assert started.wait(5)
    for prefetcher in (waiting, reading):
        prefetcher.close()
    assert not reading.ended
    finish.set()
    assert until(lambda: reading.ended and waiting.ended)


def test_clips_behind_a_url_are_fetched_concurrently(corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The barrier only opens if four clips are read at the same time."""
    url = f"memory://stream-{uuid.uuid4().hex}"
    store = Store(url)
    for name in corpus.store.names():
        store.write(name, corpus.store.read(name))
    remote, batches = Shards(url), [items(corpus, "classify", "train")[:4]] * 2
    expected = list(local_source(corpus, DataConfig(), True)(batches))
    barrier, read = threading.Barrier(4), Shards.pcm

    def pcm(self: Shards, row: int) -> Any:
        barrier.wait(5)
        return read(self, row)

    monkeypatch.setattr(Shards, "pcm", pcm)
    for batch in zip(expected, local_source(remote, DataConfig(), True)(batches), strict=True):
        assert all(same(*pair) for pair in zip(*batch, strict=True))


def test_number_of_mapped_shards_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler would count the mapped pages of a large corpus as memory of the process."""
    monkeypatch.setattr("data.preparation.shard_jobs.SHARD_BYTES", 1)
    monkeypatch.setattr("data.shards.dataset.MAPPED", 2)
    shards = make(tmp_path / "shards", "C:change! T:question!")
    assert len(shards.manifest.shards) == 6
    batches = [items(shards, "classify", split) for split in ("train", "val", "test")]
    for _ in range(2):
        examples = [example for batch in local_source(shards, DataConfig(), True)(batches) for example in batch]
        assert len({example.pcm.tobytes() for example in examples}) == 12
        del examples
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/shard-" in line}
        assert len({name for name in mapped if str(tmp_path) in name}) == 2


def through_local(shards: Shards, batches: Any) -> list[Any]:
    return list(Prefetcher(lambda: local_source(shards, DataConfig(), True)(batches)))


def through_ray(shards: Shards, batches: Any) -> list[Any]:
    """Run read tasks in this process, after a pickle as on their way to another one."""
    tasks = [module._read_task(shards, DataConfig(), part, None) for part in module._parts(batches)]
    return [table for task in pickle.loads(cloudpickle.dumps(tasks)) for table in task()]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000:-4000] = bytes(255 - byte for byte in content[1000:-4000])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("through", [through_local, through_ray])
def test_damaged_shard_fails_with_its_name(
    through: Callable[..., Any], damage: Callable[[Path], None], tmp_path: Path
) -> None:
    shards = make(tmp_path / "shards", "C:change! T:question! C:neutral!")
    [info] = shards.manifest.shards
    batches = [[item] for item in items(shards, "classify", "train")]
    damage(tmp_path / "shards" / info.name)
    with pytest.raises(DataError, match=info.name):
        through(Shards(tmp_path / "shards"), batches)


def test_error_of_a_read_task_is_unwrapped() -> None:
    """So the trial fails with a message for users, without the advice about retries that Ray appends."""
    error = DataError("shard-0.arrow: the file is missing\nFailed to apply UDF transform after 1/1 attempts")
    wrapped = RayTaskError("read", "Traceback …", error).as_instanceof_cause()
    assert module._unwrapped(wrapped) is error
    assert str(error) == "shard-0.arrow: the file is missing"
    lost = RayTaskError("read", "Traceback …", OSError("disk")).as_instanceof_cause()
    assert module._unwrapped(lost) is lost


def test_corpus_that_changes_during_a_trial_is_refused(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", "C:change! T:question!")
    batches = [items(shards, "classify", "train")]
    assert len(through_ray(shards, batches)) == 1
    shutil.rmtree(tmp_path / "shards")
    make(tmp_path / "shards", "C:change! T:reflection!")
    module._open.cache_clear()
    with pytest.raises(DataError, match="the corpus was changed"):
        through_ray(shards, batches)


@pytest.mark.parametrize("count", [0, 1, FIRST_STEPS, FIRST_STEPS + 1, 3 * STEPS_PER_TASK])
def test_read_tasks_cover_every_batch_once(count: int) -> None:
    batches = [[("classify", row)] for row in range(count)]
    parts = module._parts(batches)
    assert [batch for part in parts for batch in part] == batches
    assert len(parts[0]) <= FIRST_STEPS
    assert all(len(part) <= STEPS_PER_TASK for part in parts)
