"""Shards: content survives, the fingerprint depends on content alone, and damage is found."""

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
from data.preparation import shard_jobs
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.common import same


def small() -> Corpus:
    return synthetic.corpus(sessions=6, turns=6, seed=1)


def copy_of(shards: Shards, folder: Path) -> Path:
    """Copy a corpus to damage it; return the path of its shard."""
    shutil.copytree(shards.folder, folder)
    return folder / shards.manifest.shards[0].name


@pytest.mark.parametrize("codec", ["pcm16", "flac"])
def test_turns_are_read_as_they_were_written(tmp_path: Path, codec: str) -> None:
    written = {turn.id: turn for conversation in small().conversations for turn in conversation.turns}
    shards = prepare(small(), tmp_path / "shards", CorpusConfig(codec=codec))
    assert shards.columns["id"] == sorted(written)
    for row, turn in enumerate(written[name] for name in shards.columns["id"]):
        assert (shards.columns["text"][row], shards.columns["label"][row]) == (turn.text, turn.label)
        clip = shards.pcm(row)
        assert (clip is None) == (turn.audio is None)
        assert turn.audio is None or np.array_equal(clip, turn.audio)
    shards.verify()


def test_fingerprint_ignores_shards_and_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepare(small(), tmp_path / "one")
    flac = prepare(small(), tmp_path / "flac", CorpusConfig(codec="flac"))
    monkeypatch.setattr(shard_jobs, "SHARD_BYTES", 1 << 16)
    reverse = small()
    reverse.conversations.reverse()
    many = prepare(reverse, tmp_path / "many")
    assert len(many.manifest.shards) > len(one.manifest.shards)
    assert many.fingerprint == one.fingerprint == flac.fingerprint
    found = items(one, "classify", "train")
    assert found == items(many, "classify", "train")
    for item in found:
        first, *others = (read_example(shards, item, DataConfig(history=3), True) for shards in (one, many, flac))
        assert all(same(first, other) for other in others)


@pytest.mark.parametrize("change", ["quality", "audio", "text", "labels"])
def test_fingerprint_depends_on_content(tmp_path: Path, corpus: Shards, change: str) -> None:
    made = small()
    before = prepare(small(), tmp_path / "before").fingerprint
    match change:
        case "quality":
            made.conversations[0].quality = None
        case "audio":
            made.conversations[0].turns[1].audio[0] += 1
        case "text":
            made.conversations[0].turns[0].text += "!"
        case "labels":
            made.labels = made.labels[::-1]
    assert prepare(made, tmp_path / "after").fingerprint != before


def test_corrupt_shard_is_named(tmp_path: Path, corpus: Shards) -> None:
    path = copy_of(corpus, tmp_path / "shards")
    content = bytearray(path.read_bytes())
    row = corpus.columns["n_samples"].index(max(corpus.columns["n_samples"]))
    content[corpus.columns["offset"][row]] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}: the file is corrupt"):
        Shards(path.parent).verify()
    with pytest.raises(DataError, match=rf"{path.name}: utterance .* is corrupt"):
        Shards(path.parent).pcm(row)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=rf"{path.name}: utterance .* is corrupt"):
        Shards(path.parent).pcm(1)
    path.unlink()
    for read in (Shards.verify, lambda shards: shards.pcm(1)):
        with pytest.raises(DataError, match=rf"{path.name}: the file is missing"):
            read(Shards(path.parent))


def test_damaged_index_is_named(tmp_path: Path, corpus: Shards) -> None:
    folder = copy_of(corpus, tmp_path / "shards").parent
    index = folder / corpus.manifest.index
    index.write_bytes(index.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"index-.*: the file is corrupt"):
        Shards(folder).verify()
    with pytest.raises(DataError, match=r"index-.*: not a readable Arrow file"):
        _ = Shards(folder).columns


def test_damaged_or_foreign_manifest_is_refused(tmp_path: Path, corpus: Shards) -> None:
    manifest = copy_of(corpus, tmp_path / "shards").parent / "manifest.json"
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


def test_folds_are_used_as_splits(tmp_path: Path) -> None:
    config = CorpusConfig.model_validate({"split": {"folds": 3}})
    folds = [prepare(small(), tmp_path / "shards", config), *(Shards(tmp_path / "shards", fold) for fold in (1, 2))]
    assert len({shards.fingerprint for shards in folds}) == 3
    tested = [{row for _, row in items(shards, "classify", "test")} for shards in folds]
    assert sum(map(len, tested)) == len(set.union(*tested)) == 18
    for number, shards in enumerate(folds):
        assert {row for _, row in items(shards, "classify", "val")} == tested[(number + 1) % 3]
        assert pickle.loads(pickle.dumps(shards)).fold == number
    with pytest.raises(DataError, match=r"data\.fold is 3, but the corpus has 3 folds, counted from 0"):
        Shards(tmp_path / "shards", 3)
    with pytest.raises(DataError, match=r"data\.fold is 1, but the corpus has no folds"):
        Shards(prepare(small(), tmp_path / "plain").folder, 1)


def test_pickle_contains_only_the_address(corpus: Shards) -> None:
    assert len(corpus.columns["id"]) > 0
    assert len(pickle.dumps(corpus)) < 500
    assert pickle.loads(pickle.dumps(corpus)).manifest == corpus.manifest


def test_synthetic_sessions_are_independent() -> None:
    """A session does not depend on the number of sessions, and only good therapists reply to the label."""
    few, many = (synthetic.corpus(sessions=count, turns=20, seed=4).conversations for count in (2, 12))
    for first, second in zip(few, many, strict=False):
        assert first.quality == second.quality
        for one, other in zip(first.turns, second.turns, strict=True):
            assert (one.text, one.label, one.start, one.end) == (other.text, other.label, other.start, other.end)
            assert one.audio is other.audio is None or np.array_equal(one.audio, other.audio)
    assert {conversation.quality for conversation in many} == set(synthetic.QUALITIES)
    for conversation in many:
        good = conversation.quality == "high"
        for client, reply in zip(conversation.turns[1::2], conversation.turns[2::2], strict=False):
            fits = reply.text == synthetic.REPLIES[client.label]
            assert fits if good else reply.text not in synthetic.REPLIES.values()
