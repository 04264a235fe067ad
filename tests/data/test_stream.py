"""Sources: examples survive the journey through Arrow, are read ahead in their order, and nothing broken is skipped."""

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
from data.loading.examples import clips_from_arrow, clips_to_arrow
from data.loading.prefetch import BURST, PREFETCH, Prefetcher
from data.loading.ray_source import (
    FIRST_STEPS,
    STEPS_PER_TASK,
    _memory,
    _open,
    _parts,
    _read_task,
    _unwrapped,
    ray_source,
)
from data.loading.sources import local_source
from data.loading.tasks import items
from data.shards.dataset import Shards
from data.shards.store import Store
from tests.data.common import make, same

TASKS = ("classify", "forecast", "response", "quality")


def test_clips_survive_arrow() -> None:
    clips = [np.arange(-3, 4, dtype="<i2"), None, np.array([9], "<i2")]
    for own in (clips, clips[1:2], []):
        table = clips_to_arrow(own)
        assert table.num_rows == len(own)
        assert [clip if clip is None else clip.tolist() for clip in clips_from_arrow(table)] == [
            clip if clip is None else clip.tolist() for clip in own
        ]
    joined = pa.concat_tables([clips_to_arrow(clips), clips_to_arrow(clips[2:])]).slice(2)
    assert [clip.tolist() for clip in clips_from_arrow(joined) if clip is not None] == [[9], [9]]


def test_the_memory_of_a_read_task_serves_the_next() -> None:
    long, short = _memory(1000), _memory(10)
    assert (len(long), len(short)) == (1000, 10)
    assert np.shares_memory(long, short)


def test_both_sources_give_the_same_examples(corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is heard, also under a control, and where Ray cuts and joins its blocks in other places."""

    def carried(tasks: Any) -> Iterator[Any]:
        tables = [table for task in tasks for table in task()]
        assert len(tables) == len(tasks) > 1
        yield from clips_from_arrow(pa.concat_tables(tables))

    monkeypatch.setattr("data.loading.ray_source._clips", carried)
    own = [items(corpus, task, "train")[0] for task in TASKS]
    for config in (DataConfig(history=4), DataConfig(history=1, sound="shuffled", last_text="omitted")):
        for sound in (True, False):
            batches = [own[:3], [], own[3:], items(corpus, "classify", "val")] * FIRST_STEPS
            local, through = (list(make(corpus, config, sound)(batches)) for make in (local_source, ray_source))
            assert [len(batch) for batch in through] == [len(batch) for batch in batches]
            for one, other in zip(local, through, strict=True):
                assert all(same(*pair) for pair in zip(one, other, strict=True))
            assert all((example.pcm is not None) == sound for batch in through for example in batch)


def test_words_need_no_ray(corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("data.loading.ray_source._clips")
    [batch] = ray_source(corpus, DataConfig(), False)([items(corpus, "classify", "val")])
    assert batch
    assert all(example.pcm is None for example in batch)


def numbers(made: list[int], count: int = 100) -> Generator[list[Any], None, None]:
    """Batches by number; `made` tells which were read."""
    for number in range(count):
        made.append(number)
        yield [number]


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_a_reading_yields_everything_in_order() -> None:
    assert list(Prefetcher(lambda: numbers([]))) == [[number] for number in range(100)]
    assert list(Prefetcher(lambda: numbers([], 0))) == []
    reading = Prefetcher(lambda: numbers([], 1))
    assert [*reading, *reading] == [[0]]  # it is over for good
    assert reading.waited < 1


def test_a_reading_is_ahead_before_it_is_asked_but_not_by_much() -> None:
    made: list[int] = []
    reading = Prefetcher(lambda: numbers(made))
    assert until(lambda: len(made) == PREFETCH)
    time.sleep(0.05)
    assert len(made) == PREFETCH
    assert [next(reading) for _ in range(BURST)] == [[number] for number in range(BURST)]
    assert until(lambda: len(made) == PREFETCH + BURST)


def test_time_that_is_waited_is_told() -> None:
    def slow() -> Generator[list[Any], None, None]:
        time.sleep(0.3)
        yield [1]

    reading = Prefetcher(slow)
    assert list(reading) == [[1]]
    assert 0.2 < reading.waited < 2


def test_a_reading_comes_after_the_former_or_when_it_is_wanted() -> None:
    first, second = list[int](), list[int]()
    former = Prefetcher(lambda: numbers(first))
    later = Prefetcher(lambda: numbers(second), after=former)
    assert until(lambda: len(first) == PREFETCH)
    time.sleep(0.1)
    assert second == []
    assert next(later) == [0]  # no deadlock behind one that nobody iterates
    assert len(list(former)) == 100

    second.clear()
    later = Prefetcher(lambda: numbers(second), after=former)
    assert until(lambda: len(second) == PREFETCH)


def test_an_error_is_raised_where_its_batch_is_missed_and_as_it_was() -> None:
    error = DataError("shard-0.arrow: the file is missing")

    def broken() -> Generator[list[Any], None, None]:
        yield [0]
        yield [1]
        raise error

    reading = Prefetcher(broken)
    assert until(lambda: reading.ended)
    assert [next(reading), next(reading)] == [[0], [1]]
    with pytest.raises(DataError) as raised:
        next(reading)
    assert raised.value is error
    assert list(reading) == []


@pytest.mark.parametrize("taken", [0, 1, 50])
@pytest.mark.parametrize("end", ["closed", "forgotten", "raised out of"])
def test_an_abandoned_reading_ends_its_thread_and_its_source(taken: int, end: str) -> None:
    made: list[int] = []
    ended = threading.Event()

    def source() -> Generator[list[Any], None, None]:
        try:
            yield from numbers(made)
        finally:
            ended.set()

    def train() -> None:
        for number, _ in enumerate(Prefetcher(source), start=1):
            if number > taken:
                raise KeyError

    if end == "raised out of":
        with contextlib.suppress(KeyError):
            train()
    else:
        reading = Prefetcher(source)
        thread = reading.thread
        for _ in range(taken):
            next(reading)
        if end == "closed":
            reading.close()
            assert list(reading) == []
        else:
            del reading
        thread.join(5)
        assert not thread.is_alive()
    assert ended.wait(5)
    assert len(made) < 100


def test_closing_never_waits_for_the_batch_that_is_being_read() -> None:
    go, started = threading.Event(), threading.Event()

    def stuck() -> Generator[list[Any], None, None]:
        started.set()
        go.wait(10)
        yield [0]

    reading = Prefetcher(stuck)
    following = Prefetcher(lambda: numbers([]), after=reading)
    assert started.wait(5)
    for one in (following, reading):
        before = time.monotonic()
        one.close()
        assert time.monotonic() - before < 1
    go.set()
    assert until(lambda: reading.ended and following.ended)


def test_clips_behind_a_url_are_fetched_at_the_same_time(corpus: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a request. The barrier lets nobody pass who comes alone."""
    url = f"memory://stream-{uuid.uuid4().hex}"
    there = Store(url)
    for name in corpus.store.names():
        there.write(name, corpus.store.read(name))
    remote, batches = Shards(url), [items(corpus, "classify", "train")[:4]] * 2
    expected = list(local_source(corpus, DataConfig(), True)(batches))
    barrier, read = threading.Barrier(4), Shards.pcm

    def pcm(self: Shards, row: int) -> Any:
        barrier.wait(5)
        return read(self, row)

    monkeypatch.setattr(Shards, "pcm", pcm)
    found = list(local_source(remote, DataConfig(), True)(batches))
    for one, other in zip(expected, found, strict=True):
        assert all(same(*pair) for pair in zip(one, other, strict=True))


def test_only_so_many_shards_are_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a large corpus would fill the memory that a scheduler counts as the process's own."""
    monkeypatch.setattr("data.preparation.shard_jobs.SHARD_BYTES", 1)
    monkeypatch.setattr("data.shards.dataset.MAPPED", 2)
    shards = make(tmp_path / "shards", "C:change! T:question!")
    assert len(shards.manifest.shards) == 6
    batches = [items(shards, "classify", split) for split in ("train", "val", "test")]
    for _ in range(2):
        found = [example for batch in local_source(shards, DataConfig(), True)(batches) for example in batch]
        assert len({example.pcm.tobytes() for example in found}) == 12
        del found
        mapped = {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
        }
        assert len({name for name in mapped if "/shard-" in name}) == 2


def through_local(shards: Shards, batches: Any) -> list[Any]:
    return list(Prefetcher(lambda: local_source(shards, DataConfig(), True)(batches)))


def through_ray(shards: Shards, batches: Any) -> list[Any]:
    """What a read task does, in this process; it travels there pickled."""
    tasks = [_read_task(shards, DataConfig(), part, None) for part in _parts(batches)]
    return [table for task in pickle.loads(cloudpickle.dumps(tasks)) for table in task()]


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000:-4000] = bytes(255 - byte for byte in content[1000:-4000])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [torn, flipped, Path.unlink])
@pytest.mark.parametrize("through", [through_local, through_ray])
def test_a_damaged_shard_fails_the_trial_with_its_name(
    through: Callable[..., Any], damage: Callable[[Path], None], tmp_path: Path
) -> None:
    shards = make(tmp_path / "shards", "C:change! T:question! C:neutral!")
    [info] = shards.manifest.shards
    batches = [[item] for item in items(shards, "classify", "train")]
    damage(tmp_path / "shards" / info.name)
    with pytest.raises(DataError, match=info.name):
        through(Shards(tmp_path / "shards"), batches)


def test_what_a_read_task_raised_is_found_in_rays_error() -> None:
    """So the trial fails with a message for users, to which Ray adds advice about retries."""
    error = DataError("shard-0.arrow: the file is missing\nFailed to apply UDF transform after 1/1 attempts")
    wrapped = RayTaskError("read", "Traceback …", error).as_instanceof_cause()
    assert _unwrapped(wrapped) is error
    assert str(error) == "shard-0.arrow: the file is missing"
    lost = RayTaskError("read", "Traceback …", OSError("disk")).as_instanceof_cause()
    assert _unwrapped(lost) is lost


def test_a_corpus_that_was_prepared_anew_is_not_read_on(tmp_path: Path) -> None:
    """Its rows are others than those of the plan."""
    shards = make(tmp_path / "shards", "C:change! T:question!")
    batches = [items(shards, "classify", "train")]
    assert len(through_ray(shards, batches)) == 1
    shutil.rmtree(tmp_path / "shards")
    make(tmp_path / "shards", "C:change! T:reflection!")
    with pytest.raises(DataError, match="the corpus was changed"):
        _open.cache_clear()
        through_ray(shards, batches)


@pytest.mark.parametrize("count", [0, 1, FIRST_STEPS, FIRST_STEPS + 1, 100, 3 * STEPS_PER_TASK])
def test_read_tasks_cover_every_batch_once_and_the_first_is_short(count: int) -> None:
    batches = [[("classify", row)] for row in range(count)]
    parts = _parts(batches)
    assert [batch for part in parts for batch in part] == batches
    assert len(parts[0]) <= FIRST_STEPS
    assert all(len(part) <= STEPS_PER_TASK for part in parts)
