"""Shards: what goes in comes out, the fingerprint names content, and damage is found and named."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data import shards as shards_module
from data import synthetic
from data.config import DataConfig
from data.errors import DataError
from data.examples import read_example
from data.prepare import prepare
from data.shards import Shards
from data.tasks import items
from tests.data.common import same


def small(seed: int = 1) -> object:
    return synthetic.corpus(sessions=6, turns=6, seed=seed)


def test_turns_come_out_as_they_went_in(tmp_path: Path) -> None:
    said = {turn.id: turn for conversation in small().conversations for turn in conversation.turns}
    shards = prepare(small(), tmp_path / "shards")
    assert shards.columns["id"] == list(said)
    for row, name in enumerate(shards.columns["id"]):
        turn = said[name]
        assert (shards.columns["text"][row], shards.columns["label"][row]) == (turn.text, turn.label)
        clip = shards.pcm(row)
        assert (clip is None) == (turn.audio is None)
        assert turn.audio is None or np.array_equal(np.frombuffer(clip, "<i2"), turn.audio)
    shards.verify()


def test_the_fingerprint_names_content_and_not_sharding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepare(small(), tmp_path / "one")
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 1 << 16)
    many = prepare(small(), tmp_path / "many")
    assert len(many.manifest.shards) > len(one.manifest.shards)
    assert many.manifest.fingerprint == one.manifest.fingerprint
    found = items(one, "classify", "train")
    assert found == items(many, "classify", "train")
    for item in found:
        assert same(*(read_example(shards, item, DataConfig(history=3), True) for shards in (one, many)))
    other = prepare(small(seed=2), tmp_path / "other")
    made = small()
    made.conversations[0].quality = None
    unrated = prepare(made, tmp_path / "unrated")
    assert len({shards.manifest.fingerprint for shards in (one, other, unrated)}) == 3


def test_a_corrupt_shard_is_named(tmp_path: Path, corpus: Shards) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(corpus.folder, folder)
    path = folder / "shard-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00000\.arrow: the shard is corrupt"):
        Shards(folder).verify()
    broken = Shards(folder)
    with pytest.raises(DataError, match=r"shard-00000\.arrow: utterance .* is corrupt"):
        for row in range(broken.index.num_rows):
            broken.pcm(row)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"shard-00000\.arrow: not a readable Arrow file"):
        Shards(folder).pcm(0)
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.arrow: the shard is missing"):
        Shards(folder).verify()


def test_shards_of_another_version_are_refused(tmp_path: Path, corpus: Shards) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(corpus.folder, folder)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"schema_version": "2"', '"schema_version": "1"'))
    with pytest.raises(DataError, match=r"written as \(version, Hz\) \('1', 16000\).*prepare the corpus again"):
        Shards(folder)


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shards_module.ShardWriter, "close", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare(small(), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        prepare(small(), tmp_path)


def test_shards_travel_as_their_folder(corpus: Shards) -> None:
    assert len(corpus.columns["id"]) > 0
    assert len(pickle.dumps(corpus)) < 500
    assert pickle.loads(pickle.dumps(corpus)).manifest == corpus.manifest


def test_no_conversation_stands_in_two_splits(corpus: Shards) -> None:
    pairs = set(zip(corpus.columns["group"], corpus.columns["split"], strict=True))
    assert len(pairs) == len({group for group, _ in pairs})
