"""Features of frozen encoders in files: named by what is heard, whole or not there, read as they were written."""

import dataclasses
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.config import DataConfig
from data.errors import StorageError
from data.loading import feature_files as features
from data.loading.array_files import Files, Part, runs
from data.loading.array_files import write as write_rows
from data.loading.examples import read_clip
from data.loading.feature_files import LAYOUT, FeatureFiles, missing, parts, write
from data.loading.local_source import local_source
from data.loading.sources import feature_source
from data.loading.tasks import items
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.common import corpus, make, same

DIALOGUE = "T:question! C:change! T:other C:neutral!"
RECORDED, SHUFFLED = DataConfig(), DataConfig(sound="shuffled")
NOISY, ZEROED = DataConfig(sound="noisy"), DataConfig(sound="zeroed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("features") / "shards", DIALOGUE)


def of_row(row: int) -> np.ndarray:
    """Features that tell their row, and are as long as no neighbour's."""
    return np.full((1 + row % 5, 3), row, "<f2")


def computed(folder: Path, shards: Shards, config: DataConfig = RECORDED) -> FeatureFiles:
    for part in missing(folder, shards, config):
        write(folder, part, [of_row(row) for row in part.rows])
    return FeatureFiles(folder, shards, config)


def names(shards: Shards, config: DataConfig) -> list[str]:
    return [part.name for part in parts(shards, config)]


def test_rows_are_read_as_they_were_written(shards: Shards, tmp_path: Path) -> None:
    found = computed(tmp_path, shards)
    heard = [row for row, samples in enumerate(shards.columns["n_samples"]) if samples]
    assert len(heard) == 18
    assert all(np.array_equal(found.read(row), of_row(row)) for row in heard)
    assert missing(tmp_path, shards, RECORDED) == []


def test_a_long_shard_makes_several_files_and_each_row_is_in_one(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = parts(shards, RECORDED)
    assert len(whole) == 1
    monkeypatch.setattr(features, "PART_SAMPLES", 10_000)
    features._parts.cache_clear()
    try:
        many = parts(shards, RECORDED)
        assert len(many) == len({part.name for part in many}) > 3
        assert tuple(row for part in many for row in part.rows) == whole[0].rows
        assert sum(part.size for part in many) == whole[0].size
        found = computed(tmp_path, shards)
        assert all(np.array_equal(found.read(row), of_row(row)) for row in whole[0].rows)
    finally:
        features._parts.cache_clear()


def test_files_are_named_by_what_is_heard(shards: Shards, tmp_path: Path) -> None:
    other_labels = make(tmp_path / "labels", DIALOGUE.replace("question", "reflection"))
    other_sound = make(tmp_path / "sound", DIALOGUE + " C:change!")
    assert names(other_labels, RECORDED) == names(shards, RECORDED)
    assert other_labels.fingerprint != shards.fingerprint
    assert names(other_sound, RECORDED) != names(shards, RECORDED)
    # Shuffled clips have the features of their own rows; silence and noise are other sounds.
    assert names(shards, SHUFFLED) == names(shards, RECORDED)
    assert len({*names(shards, RECORDED), *names(shards, NOISY), *names(shards, ZEROED)}) == 3


def test_a_corpus_that_grows_keeps_what_it_has(tmp_path: Path) -> None:
    before = prepare(corpus([DIALOGUE] * 6), tmp_path / "shards")
    computed(tmp_path / "features", before)
    known = set(names(before, RECORDED))
    after = prepare(corpus([DIALOGUE] * 8), tmp_path / "shards")
    left = {part.name for part in missing(tmp_path / "features", after, RECORDED)}
    assert left
    assert left == set(names(after, RECORDED)) - known
    assert known <= set(names(after, RECORDED))


@pytest.mark.parametrize("config", [RECORDED, SHUFFLED, DataConfig(history=0)])
def test_examples_carry_the_features_of_the_clip_that_they_would_hear(
    shards: Shards, tmp_path: Path, config: DataConfig
) -> None:
    found = computed(tmp_path, shards)
    own = [*items(shards, "classify", "train"), *items(shards, "forecast", "train")]
    [read] = feature_source(shards, config, found)([own])
    [heard] = local_source(shards, config, True)([own])
    by_clip = {shards.pcm(row).tobytes(): row for part in parts(shards, config) for row in part.rows}  # type: ignore[union-attr]
    assert any(example.pcm is not None for example in heard)
    for one, other in zip(read, heard, strict=True):
        length = 0 if other.pcm is None else len(other.pcm)
        assert same(one, dataclasses.replace(other, pcm=None, n_samples=length))
        assert (one.features is None) == (other.pcm is None)
        if one.features is not None and other.pcm is not None:
            assert np.array_equal(one.features, of_row(by_clip[other.pcm.tobytes()]))
    assert (sum(read_clip(shards, item, config) is not None for item in own)) == sum(
        example.features is not None for example in read
    )


def test_a_file_that_is_gone_or_damaged_is_named(shards: Shards, tmp_path: Path) -> None:
    computed(tmp_path, shards)
    [name] = names(shards, RECORDED)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(StorageError, match=rf"{name}: damaged .*delete it"):
        FeatureFiles(tmp_path, shards, RECORDED)
    path.unlink()
    with pytest.raises(StorageError, match=rf"{name}: not seen from here; storage.cache"):
        FeatureFiles(tmp_path, shards, RECORDED)


def test_a_folder_that_cannot_be_written_is_told_and_nothing_half_written_stays(shards: Shards, tmp_path: Path) -> None:
    [part] = parts(shards, RECORDED)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"free some space, or set storage\.cache"):
        write(tmp_path / "file", part, [of_row(row) for row in part.rows])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def hold(folder: Path, part: Part[int], told: Connection) -> None:
    """A process that has read all of a file, and waits."""
    files = Files(folder, [part], LAYOUT)
    told.send(sum(float(files.arrays(row)[0].sum(dtype="<f8")) for row in part.rows))
    told.recv()


def test_the_processes_of_a_node_share_the_pages_of_a_file(tmp_path: Path) -> None:
    """Each of two slots holds half of what it reads, and nothing of its own."""
    part, size = Part("features-of-two.arrow", (0, 1), (1, 1)), 4 << 20
    write_rows(tmp_path, part, LAYOUT, [[np.full((size // 64, 32), 1 + row, "<f2")] for row in part.rows])
    spawned, pipes, slots = multiprocessing.get_context("spawn"), [], []
    for _ in range(2):
        own, other = spawned.Pipe()
        pipes.append(own)
        slots.append(spawned.Process(target=hold, args=(tmp_path, part, other)))
        slots[-1].start()
    assert [pipe.recv() for pipe in pipes] == [3 * size // 2] * 2
    for slot in slots:
        [mapped] = [own for own in psutil.Process(slot.pid).memory_maps() if own.path.endswith(part.name)]
        assert mapped.rss >= 2 * size
        assert mapped.pss <= 0.6 * mapped.rss
        assert mapped.private_dirty == 0
    for pipe, slot in zip(pipes, slots, strict=True):
        pipe.send(None)
        slot.join()


def test_the_first_files_are_short_and_what_comes_later_changes_none() -> None:
    rows = [(row, "shard", 10) for row in range(200)]
    found = runs(rows, 640)
    assert [10 * len(own) for own in found] == [20, 20, 40, 80, 160, 320, 640, 640, 80]
    for count in range(1, 200, 7):
        *whole, _ = runs(rows[:count], 640)
        assert whole == found[: len(whole)]
    assert runs([*rows, (200, "another", 10)], 640) == [*found, [200]]
