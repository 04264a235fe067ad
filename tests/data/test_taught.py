"""What a teacher said in files: named by what it read, whole or not there, read as it was written."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import StorageError
from data.loading import teacher_files as taught
from data.loading.array_files import missing
from data.loading.examples import read_example
from data.loading.local_source import local_source
from data.loading.sources import taught_source
from data.loading.tasks import Item, items
from data.loading.teacher_files import Taught, TeacherFiles, TeacherLogits, parts, write
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.common import corpus, make, same

DIALOGUE = "T:question! C:change! T:other! C:neutral!"
CONFIG = DataConfig(history=2)
Lessons = dict[Item, TeacherLogits]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("taught") / "shards", DIALOGUE)


def read(shards: Shards, config: DataConfig = CONFIG, tasks: tuple[str, ...] = ("classify", "response")) -> Lessons:
    """Tokens are the letters of the dialogue, and the answer's are predicted."""
    found = {}
    for item in (item for task in tasks for item in items(shards, task, "train")):
        example = read_example(shards, item, config, sound=False)
        ids = np.frombuffer(f"{example.turns} {example.answer}".encode(), "u1")
        found[item] = TeacherLogits(ids.astype("<i4"), len(example.answer))
    return found


def said(lesson: TeacherLogits) -> Taught:
    """What tells its lesson, and is as long as its prediction."""
    number = int(lesson.digest[:6], 16)
    return np.full((lesson.predicted, 4), number, "<i4"), np.full((lesson.predicted, 5), -number / 7, "<f4")


def computed(folder: Path, shards: Shards, lessons: Lessons) -> TeacherFiles:
    found = parts(shards, lessons)
    for part in missing(folder, found):
        write(folder, part, [said(lessons[item]) for item in part.rows])
    return TeacherFiles(folder, found)


def names(shards: Shards, lessons: Lessons) -> list[str]:
    return [part.name for part in parts(shards, lessons)]


def test_items_are_read_as_they_were_written(shards: Shards, tmp_path: Path) -> None:
    lessons = read(shards)
    found = computed(tmp_path, shards, lessons)
    assert len(lessons) == 20
    for item, lesson in lessons.items():
        own = found.read(item)
        assert own is not None
        assert [(values.dtype, values.shape) for values in own] == [(v.dtype, v.shape) for v in said(lesson)]
        assert all(map(np.array_equal, own, said(lesson)))
    assert missing(tmp_path, parts(shards, lessons)) == []
    assert all(found.read(item) is None for item in items(shards, "classify", "val"))


def test_many_tokens_make_several_files(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = read(shards)
    assert len(parts(shards, lessons)) == 2  # a task each
    monkeypatch.setattr(taught, "PART_TOKENS", 300)
    many = parts(shards, lessons)
    assert len({part.name for part in many}) == len(many) > 4
    assert [item for part in many for item in part.rows] == list(lessons)
    assert sum(part.size for part in many) == sum(len(lesson.ids) for lesson in lessons.values())
    found = computed(tmp_path, shards, lessons)
    assert all(map(np.array_equal, found.read(list(lessons)[-1]) or (), said(list(lessons.values())[-1])))


def test_files_are_named_by_what_is_read_and_predicted(shards: Shards, tmp_path: Path) -> None:
    without_sound = make(tmp_path / "words", DIALOGUE.replace("!", ""))
    labels = make(tmp_path / "labels", DIALOGUE.replace("question", "reflection"))
    own = names(shards, read(shards))
    assert names(without_sound, read(without_sound)) == own
    # Each task has files of its own, so another task or labels that it does not read leave them as they are.
    assert set(names(shards, read(shards, tasks=("response",)))) < set(own)
    assert len(set(names(labels, read(labels))) & set(own)) == 1
    assert not set(names(shards, read(shards, DataConfig(history=0)))) & set(own)
    longer = {item: TeacherLogits(one.ids, one.predicted + 1) for item, one in read(shards).items()}
    assert not set(names(shards, longer)) & set(own)


def test_a_corpus_that_grows_keeps_what_it_has(tmp_path: Path) -> None:
    before = prepare(corpus([DIALOGUE] * 6), tmp_path / "shards")
    computed(tmp_path / "teacher", before, read(before))
    known = set(names(before, read(before)))
    after = prepare(corpus([DIALOGUE] * 12), tmp_path / "shards")
    left = {part.name for part in missing(tmp_path / "teacher", parts(after, read(after)))}
    assert left
    assert left == set(names(after, read(after))) - known
    assert known <= set(names(after, read(after)))


def test_examples_carry_what_was_said_of_them(shards: Shards, tmp_path: Path) -> None:
    lessons = read(shards)
    found = computed(tmp_path, shards, lessons)
    batches = [list(lessons)[:5], list(lessons)[5:], items(shards, "classify", "val")]
    plain = local_source(shards, CONFIG, True)
    with_teacher = list(taught_source(plain, found)(batches, None))
    for batch, own, heard in zip(batches, with_teacher, plain(batches, None), strict=True):
        for item, one, other in zip(batch, own, heard, strict=True):
            assert same(one, dataclasses.replace(other, taught=one.taught))
            assert (one.taught is None) == (item not in lessons)
            assert one.taught is None or all(map(np.array_equal, one.taught, said(lessons[item])))


def test_a_file_that_is_gone_or_damaged_is_named(shards: Shards, tmp_path: Path) -> None:
    lessons = read(shards)
    computed(tmp_path, shards, lessons)
    name = names(shards, lessons)[0]
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(StorageError, match=rf"{name}: damaged .*delete it"):
        TeacherFiles(tmp_path, parts(shards, lessons))
    path.unlink()
    with pytest.raises(StorageError, match=rf"{name}: not seen from here; storage.cache"):
        TeacherFiles(tmp_path, parts(shards, lessons))
