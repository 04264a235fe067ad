"""Sources: examples survive the journey through Arrow, and hold the dialogue they should."""

import numpy as np

from data.examples import Example, from_arrow, has_sound, read_example, targets, to_arrow
from data.shards import Shards
from data.stream import local_source


def same(one: Example, other: Example) -> bool:
    names = [name for name in Example.__slots__ if name != "pcm"]
    return all(getattr(one, name) == getattr(other, name) for name in names) and (
        (one.pcm is None and other.pcm is None) or np.array_equal(one.pcm, other.pcm)
    )


def test_examples_survive_arrow(corpus: Shards) -> None:
    rows = targets(corpus, "train")
    for sound in (True, False):
        batches = list(local_source(corpus, 4, sound)([rows[:3], [], rows[3:4]]))
        again = from_arrow(to_arrow(batches))
        assert [len(batch) for batch in again] == [3, 0, 1]
        for before, after in zip(batches, again, strict=True):
            assert all(same(*pair) for pair in zip(before, after, strict=True))
        assert all((example.pcm is not None) == sound for batch in again for example in batch)


def test_history_is_the_dialogue_before_the_utterance(corpus: Shards) -> None:
    columns = corpus.columns
    for row in targets(corpus, "val"):
        example = read_example(corpus, row, 2, sound=False)
        before = [
            (columns["speaker"][other], columns["text"][other])
            for other in range(row)
            if columns["conversation"][other] == columns["conversation"][row]
        ]
        assert list(example.history) == before[-2:]
    assert read_example(corpus, row, 0, sound=False).history == ()


def test_targets_are_labelled_and_heard(corpus: Shards) -> None:
    assert has_sound(corpus)
    for split in ("train", "val", "test"):
        for row in targets(corpus, split):
            assert corpus.columns["label"][row] is not None
            assert corpus.columns["n_samples"][row] > 0
            assert corpus.columns["split"][row] == split
