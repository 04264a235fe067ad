"""Shards: what goes in comes out, the fingerprint names content, and damage is found and named."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus import synthetic
from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError
from data.loading.examples import read_example
from data.loading.tasks import items
from data.preparation import shard_jobs as jobs
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.common import same


def small(seed: int = 1) -> Corpus:
    return synthetic.corpus(sessions=6, turns=6, seed=seed)


def copied(shards: Shards, folder: Path) -> Path:
    """A copy to damage; the path of its shard."""
    shutil.copytree(shards.folder, folder)
    return folder / shards.manifest.shards[0].name


@pytest.mark.parametrize("codec", ["pcm16", "flac"])
def test_turns_come_out_as_they_went_in(tmp_path: Path, codec: str) -> None:
    said = {turn.id: turn for conversation in small().conversations for turn in conversation.turns}
    shards = prepare(small(), tmp_path / "shards", CorpusConfig(codec=codec))
    assert shards.columns["id"] == sorted(said)
    for row, name in enumerate(shards.columns["id"]):
        turn = said[name]
        assert (shards.columns["text"][row], shards.columns["label"][row]) == (turn.text, turn.label)
        clip = shards.pcm(row)
        assert (clip is None) == (turn.audio is None)
        assert turn.audio is None or np.array_equal(clip, turn.audio)
    shards.verify()


def test_the_fingerprint_names_content_and_neither_sharding_nor_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare(small(), tmp_path / "one")
    flac = prepare(small(), tmp_path / "flac", CorpusConfig(codec="flac"))
    monkeypatch.setattr(jobs, "SHARD_BYTES", 1 << 16)
    shuffled = small()
    shuffled.conversations.reverse()
    many = prepare(shuffled, tmp_path / "many")
    assert len(many.manifest.shards) > len(one.manifest.shards)
    assert many.fingerprint == one.fingerprint == flac.fingerprint
    found = items(one, "classify", "train")
    assert found == items(many, "classify", "train")
    for item in found:
        first, *others = (read_example(shards, item, DataConfig(history=3), True) for shards in (one, many, flac))
        assert all(same(first, other) for other in others)


def test_the_fingerprint_changes_with_anything_that_can_be_seen(tmp_path: Path) -> None:
    def unrated(corpus: Corpus) -> None:
        corpus.conversations[0].quality = None

    def louder(corpus: Corpus) -> None:
        corpus.conversations[0].turns[1].audio[0] += 1

    def reworded(corpus: Corpus) -> None:
        corpus.conversations[0].turns[0].text += "!"

    def other_order(corpus: Corpus) -> None:
        corpus.labels = corpus.labels[::-1]

    seen = {prepare(small(), tmp_path / "as it is").fingerprint}
    changes = (unrated, louder, reworded, other_order)
    for change in changes:
        corpus = small()
        change(corpus)
        seen.add(prepare(corpus, tmp_path / change.__name__).fingerprint)
    assert len(seen) == 1 + len(changes)


def test_a_corrupt_shard_is_named(tmp_path: Path, corpus: Shards) -> None:
    path = copied(corpus, tmp_path / "shards")
    content = bytearray(path.read_bytes())
    place = corpus.columns["offset"][corpus.columns["n_samples"].index(max(corpus.columns["n_samples"]))]
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}: the file is corrupt"):
        Shards(path.parent).verify()
    broken = Shards(path.parent)
    with pytest.raises(DataError, match=rf"{path.name}: utterance .* is corrupt"):
        for row in range(broken.index.num_rows):
            broken.pcm(row)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=rf"{path.name}: utterance .* is corrupt"):
        Shards(path.parent).pcm(1)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: the file is missing"):
        Shards(path.parent).verify()
    with pytest.raises(DataError, match=rf"{path.name}: the file is missing"):
        Shards(path.parent).pcm(1)


def test_a_damaged_index_is_named(tmp_path: Path, corpus: Shards) -> None:
    folder = copied(corpus, tmp_path / "shards").parent
    index = folder / corpus.manifest.index
    index.write_bytes(index.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"index-.*: the file is corrupt"):
        Shards(folder).verify()
    with pytest.raises(DataError, match=r"index-.*: not a readable Arrow file"):
        _ = Shards(folder).columns


def test_a_damaged_or_foreign_manifest_is_refused(tmp_path: Path, corpus: Shards) -> None:
    manifest = copied(corpus, tmp_path / "shards").parent / "manifest.json"
    whole = manifest.read_text()
    for old, new, message in (
        ('"schema_version": "3"', '"schema_version": "2"', r"its \(version, Hz\) is \('2', 16000\).*prepare"),
        (corpus.manifest.shards[0].name, "../../etc/passwd", r"shards\.0\.name: String should match"),
        ('"corpus"', '"corpse"', "manifest.json: corpus: Field required"),
        ("{", "", "manifest.json: file: Invalid JSON"),
    ):
        assert old in whole
        manifest.write_text(whole.replace(old, new, 1))
        with pytest.raises(DataError, match=message):
            Shards(manifest.parent)


def test_folds_serve_as_splits(tmp_path: Path) -> None:
    config = CorpusConfig.model_validate({"split": {"folds": 3}})
    shards = [prepare(small(), tmp_path / "shards", config)]
    shards += [Shards(tmp_path / "shards", fold) for fold in (1, 2)]
    assert len({one.fingerprint for one in shards}) == 3
    tested = [{row for _, row in items(one, "classify", "test")} for one in shards]
    assert sum(map(len, tested)) == len(set.union(*tested)) == 18
    for number, one in enumerate(shards):
        assert {row for _, row in items(one, "classify", "val")} == tested[(number + 1) % 3]
        assert pickle.loads(pickle.dumps(one)).fold == number
    with pytest.raises(DataError, match=r"data\.fold is 3, but the corpus has 3 folds, counted from 0"):
        Shards(tmp_path / "shards", 3)
    with pytest.raises(DataError, match=r"data\.fold is 1, but the corpus has no folds"):
        Shards(prepare(small(), tmp_path / "plain").folder, 1)


def test_shards_travel_as_their_folder(corpus: Shards) -> None:
    assert len(corpus.columns["id"]) > 0
    assert len(pickle.dumps(corpus)) < 500
    assert pickle.loads(pickle.dumps(corpus)).manifest == corpus.manifest
