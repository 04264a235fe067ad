"""The feature cache on disk: how files are named and split, and that both kinds are read as they were written."""

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from data.config import DataConfig
from data.errors import StorageError
from data.loading import feature_files as feature_module
from data.loading import teacher_files as teacher_module
from data.loading.cached_arrays import CacheFile, CacheReader, missing_files, split_into_files, write_file
from data.loading.examples import read_example, read_item_clip
from data.loading.feature_files import FeatureReader, feature_files
from data.loading.sources import feature_source, local_source, teacher_source
from data.loading.tasks import Item, items
from data.loading.teacher_files import TeacherInput, TeacherLogits, TeacherReader, teacher_files
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.common import corpus, make, same

DIALOGUE = "T:question! C:change! T:other C:neutral!"
RECORDED, SHUFFLED = DataConfig(history=2), DataConfig(sound="shuffled")
Inputs = dict[Item, TeacherInput]


def teacher_inputs(
    shards: Shards, config: DataConfig = RECORDED, tasks: Sequence[str] = ("classify", "response")
) -> Inputs:
    """The letters of the dialogue stand for tokens, and those of the answer are predicted."""
    inputs = {}
    for item in (item for task in tasks for item in items(shards, task, "train")):
        example = read_example(shards, item, config, with_audio=False)
        ids = np.frombuffer(f"{example.turns} {example.answer}".encode(), "u1")
        inputs[item] = TeacherInput(ids.astype("<i4"), len(example.answer))
    return inputs


def features_of(shards: Shards, row: int) -> list[np.ndarray]:
    """Features that identify their row, and are as long as no neighbour's."""
    return [np.full((1 + row % 5, 3), row, "<f2")]


def logits_of(shards: Shards, item: Item) -> TeacherLogits:
    """Logits that identify their input, and are as long as its prediction."""
    read = teacher_inputs(shards)[item]
    number = int(read.digest[:6], 16)
    ids = np.full((read.predicted, 4), number, "<i4")
    return TeacherLogits(ids, np.full((read.predicted, 5), -number / 7, "<f4"))


class Kind(NamedTuple):
    files: Callable[[Shards], list[CacheFile[Any]]]
    arrays: Callable[[Shards, Any], Sequence[np.ndarray]]
    layout: dict[str, str]
    reader: Callable[[Path, Shards], CacheReader[Any]]

    def compute(self, folder: Path, shards: Shards) -> CacheReader[Any]:
        for file in missing_files(folder, self.files(shards)):
            write_file(folder, file, self.layout, [self.arrays(shards, row) for row in file.rows])
        return self.reader(folder, shards)


FEATURES = Kind(
    lambda shards: feature_files(shards, RECORDED),
    features_of,
    feature_module.LAYOUT,
    lambda folder, shards: FeatureReader(folder, shards, RECORDED),
)
LOGITS = Kind(
    lambda shards: teacher_files(shards, teacher_inputs(shards)),
    logits_of,
    teacher_module.LAYOUT,
    lambda folder, shards: TeacherReader(folder, teacher_files(shards, teacher_inputs(shards))),
)
both_kinds = pytest.mark.parametrize("kind", [FEATURES, LOGITS], ids=["features", "logits"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("cache") / "shards", DIALOGUE)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(feature_module, "FILE_SAMPLES", 10_000)
    monkeypatch.setattr(teacher_module, "FILE_TOKENS", 300)
    feature_module._feature_files.cache_clear()
    yield
    feature_module._feature_files.cache_clear()


def names(files: Sequence[CacheFile[Any]]) -> set[str]:
    return {file.name for file in files}


@both_kinds
@pytest.mark.parametrize("files", [1, 4], ids=["one file", "many files"])
def test_rows_are_read_as_written(files: int, kind: Kind, shards: Shards, tmp_path: Path, request: Any) -> None:
    if files > 1:
        request.getfixturevalue("small_files")
    reader, found = kind.compute(tmp_path, shards), kind.files(shards)
    rows = [row for file in found for row in file.rows]
    assert len(names(found)) == len(found) >= files
    assert len(rows) == len(set(rows)) == (18 if kind is FEATURES else 16)
    for row in rows:
        read, written = reader.arrays(row), kind.arrays(shards, row)
        assert [values.dtype for values in read] == [values.dtype for values in written]
        assert all(map(np.array_equal, read, written))
    assert missing_files(tmp_path, found) == []


@both_kinds
def test_growing_corpus_keeps_its_files(kind: Kind, tmp_path: Path) -> None:
    before = prepare(corpus([DIALOGUE] * 6), tmp_path / "shards")
    kind.compute(tmp_path / "cache", before)
    old = names(kind.files(before))
    after = prepare(corpus([DIALOGUE] * 12), tmp_path / "shards")
    new = names(kind.files(after))
    assert old < new
    assert names(missing_files(tmp_path / "cache", kind.files(after))) == new - old


@both_kinds
def test_missing_or_damaged_file_is_reported(kind: Kind, shards: Shards, tmp_path: Path) -> None:
    kind.compute(tmp_path, shards)
    path = tmp_path / kind.files(shards)[0].name
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(StorageError, match=rf"{path.name}: damaged .*delete the file"):
        kind.reader(tmp_path, shards)
    path.unlink()
    with pytest.raises(StorageError, match=rf"{path.name}: not visible from this node; storage.cache"):
        kind.reader(tmp_path, shards)


def test_unwritable_folder_is_reported(shards: Shards, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"free some space, or set storage\.cache"):
        FEATURES.compute(tmp_path / "file", shards)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_feature_files_are_named_by_the_audio(shards: Shards, tmp_path: Path) -> None:
    def named(corpus: Shards, sound: str = "recorded") -> set[str]:
        return names(feature_files(corpus, DataConfig.model_validate({"sound": sound})))

    other_labels = make(tmp_path / "labels", DIALOGUE.replace("question", "reflection"))
    other_audio = make(tmp_path / "audio", DIALOGUE + " C:change!")
    assert other_labels.fingerprint != shards.fingerprint
    assert named(other_labels) == named(shards) == named(shards, "shuffled")  # these have the features of other rows
    assert len({*named(shards), *named(other_audio), *named(shards, "noisy"), *named(shards, "zeroed")}) == 4


def test_logits_files_are_named_by_the_input(shards: Shards, tmp_path: Path) -> None:
    def named(inputs: Inputs) -> set[str]:
        return names(teacher_files(shards, inputs))

    audible, silent = (
        make(tmp_path / f"text{mark}", "T:question! C:change! T:other! C:neutral!".replace("!", mark))
        for mark in ("!", "")
    )
    assert named(teacher_inputs(audible)) == named(teacher_inputs(silent))
    labels = make(tmp_path / "labels", DIALOGUE.replace("question", "reflection"))
    base = named(teacher_inputs(shards))
    assert named(teacher_inputs(shards, tasks=["response"])) < base  # each task has its own files
    assert len(named(teacher_inputs(labels)) & base) == 1  # those of the task that does not predict labels
    assert not named(teacher_inputs(shards, DataConfig(history=0))) & base
    longer = {item: TeacherInput(read.ids, read.predicted + 1) for item, read in teacher_inputs(shards).items()}
    assert not named(longer) & base


@pytest.mark.parametrize("config", [RECORDED, SHUFFLED, DataConfig(history=0)])
def test_examples_carry_features_of_their_clip(shards: Shards, tmp_path: Path, config: DataConfig) -> None:
    reader = FEATURES.compute(tmp_path, shards)
    assert isinstance(reader, FeatureReader)
    batch = [*items(shards, "classify", "train"), *items(shards, "forecast", "train")]
    [with_features] = feature_source(shards, config, [reader])([batch])
    [with_audio] = local_source(shards, config, True)([batch])
    rows = {shards.pcm(row).tobytes(): row for file in FEATURES.files(shards) for row in file.rows}  # type: ignore[union-attr]
    assert any(example.pcm is not None for example in with_audio)
    for item, cached, example in zip(batch, with_features, with_audio, strict=True):
        length = 0 if example.pcm is None else len(example.pcm)
        assert same(cached, dataclasses.replace(example, pcm=None, n_samples=length))
        assert (cached.features is None) == (example.pcm is None) == (read_item_clip(shards, item, config) is None)
        if cached.features is not None and example.pcm is not None:
            [features] = cached.features
            assert np.array_equal(features, features_of(shards, rows[example.pcm.tobytes()])[0])


def test_training_examples_carry_teacher_logits(shards: Shards, tmp_path: Path) -> None:
    reader = LOGITS.compute(tmp_path, shards)
    assert isinstance(reader, TeacherReader)
    read, val = list(teacher_inputs(shards)), items(shards, "classify", "val")
    batches = [read[:5], read[5:], val]
    plain = local_source(shards, RECORDED, True)
    cached = teacher_source(plain, reader)(batches, None)
    for batch, with_logits, examples in zip(batches, cached, plain(batches, None), strict=True):
        for item, one, example in zip(batch, with_logits, examples, strict=True):
            assert same(one, example)
            assert (one.teacher_logits is None) == (batch is val)
            assert one.teacher_logits is None or all(map(np.array_equal, one.teacher_logits, logits_of(shards, item)))


def hold(folder: Path, file: CacheFile[int], pipe: Connection) -> None:
    """Read all of a file, and wait."""
    reader = CacheReader(folder, [file], feature_module.LAYOUT)
    pipe.send(sum(float(reader.arrays(row)[0].sum(dtype="<f8")) for row in file.rows))
    pipe.recv()


def test_processes_share_the_pages_of_a_file(tmp_path: Path) -> None:
    """Each of two processes accounts for half of the pages that it has mapped, and has no private copy."""
    file, size = CacheFile("features-of-two.arrow", (0, 1), (1, 1)), 4 << 20
    arrays = [[np.full((size // 64, 32), 1 + row, "<f2")] for row in file.rows]
    write_file(tmp_path, file, feature_module.LAYOUT, arrays)
    context, pipes, processes = multiprocessing.get_context("fork"), [], []
    for _ in range(2):
        mine, theirs = context.Pipe()
        pipes.append(mine)
        processes.append(context.Process(target=hold, args=(tmp_path, file, theirs)))
        processes[-1].start()
    assert [pipe.recv() for pipe in pipes] == [3 * size // 2] * 2
    for process in processes:
        [mapped] = [region for region in psutil.Process(process.pid).memory_maps() if region.path.endswith(file.name)]
        assert mapped.rss >= 2 * size
        assert mapped.pss <= 0.6 * mapped.rss
        assert mapped.private_dirty == 0
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()


def test_first_files_are_short_and_never_change() -> None:
    rows = [(row, "shard", 10) for row in range(200)]
    runs = split_into_files(rows, 640)
    assert [10 * len(run) for run in runs] == [20, 20, 40, 80, 160, 320, 640, 640, 80]
    for count in range(1, 200, 7):
        *complete, _ = split_into_files(rows[:count], 640)
        assert complete == runs[: len(complete)]
    assert split_into_files([*rows, (200, "another", 10)], 640) == [*runs, [200]]
