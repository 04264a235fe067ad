"""Sources: examples of every task survive the journey through Arrow, and clips are read only if they are heard."""

from pathlib import Path

from data.config import DataConfig
from data.examples import from_arrow, to_arrow
from data.shards import Shards
from data.stream import _plan_datasource, local_source
from data.tasks import items
from tests.data.common import make, same

TASKS = ("classify", "forecast", "response", "quality")


def test_examples_survive_arrow(corpus: Shards) -> None:
    own = [items(corpus, task, "train")[0] for task in TASKS]
    for sound in (True, False):
        batches = list(local_source(corpus, DataConfig(history=4), sound)([own[:3], [], own[3:]]))
        assert [example.task for batch in batches for example in batch] == list(TASKS)
        again = from_arrow(to_arrow(batches))
        assert [len(batch) for batch in again] == [3, 0, 1]
        for before, after in zip(batches, again, strict=True):
            assert all(same(*pair) for pair in zip(before, after, strict=True))
        assert all((example.pcm is not None) == sound for batch in again for example in batch)


def test_a_dialogue_without_a_clip_survives_arrow(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", "C:change T:question")
    batches = list(local_source(shards, DataConfig(), False)([items(shards, "classify", "train")]))
    [again] = from_arrow(to_arrow(batches))
    assert all(same(*pair) for pair in zip(batches[0], again, strict=True))
    assert {(example.heard, example.pcm) for example in again} == {(None, None)}


def test_both_sources_read_the_same_config(corpus: Shards) -> None:
    """The table that Ray carries is made by the very reader of the local source, also under a control."""
    config = DataConfig(history=1, sound="shuffled", last_text="omitted")
    own = items(corpus, "classify", "val")
    [local] = local_source(corpus, config, True)([own])
    [[table]] = [list(task()) for task in _plan_datasource(corpus, config, True, [own]).get_read_tasks(1)]
    [carried] = from_arrow(table)
    assert all(same(*pair) for pair in zip(local, carried, strict=True))
