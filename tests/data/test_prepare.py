"""Preparing: complete or not at all, on after a kill, and only what is new when a corpus grows."""

import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.corpus import synthetic
from data.corpus.config import CorpusConfig
from data.corpus.schema import SAMPLE_RATE, Corpus
from data.errors import DataError
from data.preparation import shard_jobs as jobs
from data.preparation.build import prepare
from data.preparation.shard_jobs import ShardJob, serially
from data.shards.dataset import Shards
from data.shards.format import ShardFile
from data.shards.store import Store


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SHARD_BYTES", 1 << 16)


def made(sessions: int = 8) -> Corpus:
    return synthetic.corpus(sessions=sessions, turns=6, seed=1)


class Counted:
    """Makes shards and notes which; may be cut off after some of them."""

    def __init__(self, most: int | None = None) -> None:
        self.names: list[str] = []
        self.most = most

    def __call__(self, todo: Sequence[ShardJob]) -> Iterator[ShardFile]:
        for job in todo:
            if len(self.names) == self.most:
                raise KeyboardInterrupt
            self.names.append(job.name)
            yield from serially([job])


def test_an_interrupted_preparation_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = prepare(made(), tmp_path / "whole")
    first, second = Counted(3), Counted()
    with pytest.raises(KeyboardInterrupt):
        prepare(made(), tmp_path / "cut", run=first)
    with pytest.raises(DataError, match="no manifest"):
        Shards(tmp_path / "cut")
    again = prepare(made(), tmp_path / "cut", run=second)
    assert len(first.names) == 3
    assert {*first.names, *second.names} == {shard.name for shard in whole.manifest.shards}
    assert not set(first.names) & set(second.names)
    assert again.fingerprint == whole.fingerprint
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").glob("*.arrow")} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.arrow")
    }


def test_a_torn_shard_is_made_again(tmp_path: Path) -> None:
    counted = Counted(3)
    with pytest.raises(KeyboardInterrupt):
        prepare(made(), tmp_path / "shards", run=counted)
    torn = tmp_path / "shards" / counted.names[1]
    torn.write_bytes(torn.read_bytes()[:-100])
    (tmp_path / "shards" / ".shard-00.arrow.unfinished-1").write_bytes(b"half")
    again = Counted()
    shards = prepare(made(), tmp_path / "shards", run=again)
    assert counted.names[1] in again.names
    assert counted.names[0] not in again.names
    shards.verify()


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    prepare(made(), tmp_path / "shards")
    again = Counted()
    assert prepare(made(), tmp_path / "shards", run=again).fingerprint == Shards(tmp_path / "shards").fingerprint
    assert again.names == []


def test_added_sessions_are_all_that_is_written_and_nobody_changes_his_split(tmp_path: Path) -> None:
    before = prepare(made(8), tmp_path / "shards")
    old = dict(zip(before.columns["conversation"], before.columns["split"], strict=True))
    counted = Counted()
    after = prepare(made(12), tmp_path / "shards", run=counted)
    new = dict(zip(after.columns["conversation"], after.columns["split"], strict=True))
    assert old.items() <= new.items()
    written = {name for shard in after.manifest.shards if shard.name in counted.names for name in shard.conversations}
    assert written == new.keys() - old.keys()
    assert after.fingerprint != before.fingerprint
    assert sum(after.manifest.sessions.values()) == 12
    after.verify()
    named = {after.manifest.index, "manifest.json", "findings.jsonl", *(shard.name for shard in after.manifest.shards)}
    assert {path.name for path in (tmp_path / "shards").iterdir()} == named


def test_a_changed_session_is_written_anew(tmp_path: Path) -> None:
    prepare(made(), tmp_path / "shards")
    corpus, counted = made(), Counted()
    corpus.conversations[0].turns[0].text = "something else"
    for turn in corpus.conversations[1].turns:
        turn.where = "moved:1"  # by a row above: no change of content
    shards = prepare(corpus, tmp_path / "shards", run=counted)
    written = {name for shard in shards.manifest.shards if shard.name in counted.names for name in shard.conversations}
    assert written == {"c000"}
    assert shards.columns["where"][shards.columns["conversation"].index("c001")] == "moved:1"
    assert len(counted.names) < len(shards.manifest.shards)
    assert shards.columns["text"][shards.columns["id"].index("c000/0")] == "something else"
    shards.verify()


def test_nothing_is_lost_without_a_word(tmp_path: Path) -> None:
    """The source is the whole corpus: one with the new sessions alone would replace the others."""
    before = prepare(made(8), tmp_path / "shards")
    with pytest.raises(DataError, match=r"2 of its sessions are not in the source, which must have all: c006, c007"):
        prepare(made(6), tmp_path / "shards")
    silent = made(8)
    for turn in (turn for one in silent.conversations for turn in one.turns):
        turn.audio = None
    with pytest.raises(DataError, match="it has audio, but the source has none; give --audio as before"):
        prepare(silent, tmp_path / "shards")
    before.verify()
    assert Shards(tmp_path / "shards").fingerprint == before.fingerprint


def test_a_failed_addition_leaves_the_corpus_as_it_was(tmp_path: Path) -> None:
    before = prepare(made(8), tmp_path / "shards")
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    grown = made(10)
    grown.conversations[9].turns[1].label = "nonsense"
    with pytest.raises(DataError, match="F_REJECTED"):
        prepare(grown, tmp_path / "shards")
    failing = Counted()

    def fail(todo: Sequence[ShardJob]) -> Iterator[ShardFile]:
        yield from failing(todo)
        raise DataError("the last one cannot be made")

    with pytest.raises(DataError, match="the last one"):
        prepare(made(10), tmp_path / "shards", run=fail)
    assert failing.names
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == names
    before.verify()


def test_a_corrupt_shard_is_made_again(tmp_path: Path) -> None:
    shards = prepare(made(), tmp_path / "shards")
    damaged = tmp_path / "shards" / shards.manifest.shards[2].name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    again = Counted()
    prepare(made(), tmp_path / "shards", run=again).verify()
    assert again.names == [damaged.name]


def test_a_folder_is_prepared_by_one_at_a_time(tmp_path: Path) -> None:
    def meanwhile(todo: Sequence[ShardJob]) -> Iterator[ShardFile]:
        with pytest.raises(DataError, match="another `sweep prepare` is running here"):
            prepare(made(), tmp_path / "shards")
        yield from serially(todo)

    prepare(made(), tmp_path / "shards", run=meanwhile).verify()


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".shard-00.arrow.unfinished-1").write_bytes(b"half")
    prepare(made(), tmp_path / "shards")
    assert not list((tmp_path / "shards").glob(".*"))


def test_a_recording_that_the_worker_does_not_see_is_no_silence(tmp_path: Path) -> None:
    corpus = made()
    soundfile.write(tmp_path / "x.wav", np.zeros(160_000), SAMPLE_RATE)
    corpus.conversations[3].recording = tmp_path / "x.wav"

    def elsewhere(todo: Sequence[ShardJob]) -> Iterator[ShardFile]:
        (tmp_path / "x.wav").unlink()
        return serially(todo)

    with pytest.raises(DataError, match=r"x\.wav: the recording is not visible on this node"):
        prepare(corpus, tmp_path / "shards", run=elsewhere)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"cannot be used \(.*; check path, rights and connection"):
        prepare(made(), tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_prefix_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bucket" / "precious").mkdir(parents=True)
    (tmp_path / "bucket" / "precious" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="exists already and is not a corpus"):
        prepare(made(), f"file://{tmp_path}/bucket")
    assert (tmp_path / "bucket" / "precious" / "manifest.json").exists()


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    prepare(made(), tmp_path / "shards")
    with pytest.raises(DataError, match=r"has other settings .*codec: 'pcm16' → 'flac'"):
        prepare(made(), tmp_path / "shards", CorpusConfig(codec="flac"))
    prepare(made(), tmp_path / "shards", CorpusConfig(max_rejected=0.5))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="exists already and is not a corpus"):
        prepare(made(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_corpus_that_cannot_be_used_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 session.*add sessions"):
        prepare(synthetic.corpus(sessions=2, turns=6), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_sessions(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    prepare(made(), tmp_path / "shards", progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 8)
    assert told[-1] == (8, 8)
    assert told == sorted(told)


def _prepare_slowly(folder: Path) -> None:
    def slow(todo: Sequence[ShardJob]) -> Iterator[ShardFile]:
        for job in todo:
            yield from serially([job])
            time.sleep(0.05)

    jobs.SHARD_BYTES = 1 << 16
    prepare(made(), folder, run=slow)


def test_kill_9_at_any_moment_and_the_same_command_carries_on(tmp_path: Path) -> None:
    whole = prepare(made(), tmp_path / "whole")
    context, folder, kills = multiprocessing.get_context("forkserver"), tmp_path / "killed", 0
    context.set_forkserver_preload(["tests.data.test_prepare"])
    for attempt in range(6):
        process = context.Process(target=_prepare_slowly, args=(folder,))
        process.start()
        time.sleep(0.15 + 0.1 * attempt)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert not (folder / "manifest.json").exists() or Shards(folder).fingerprint == whole.fingerprint
    assert kills > 0
    again = prepare(made(), folder)
    again.verify()
    assert again.fingerprint == whole.fingerprint


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bucket")
    yield f"s3://bucket/corpus?scheme=http&endpoint_override={host}:{port}"
    server.stop()


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_store_behind_a_url_holds_the_same(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("s3") if kind == "s3" else "memory://bucket/corpus"
    config = CorpusConfig(codec="flac")
    local = prepare(made(), tmp_path / "local", config)
    with pytest.raises(KeyboardInterrupt):
        prepare(made(), url, config, run=Counted(3))
    with pytest.raises(DataError, match="no manifest"):
        Shards(url)
    counted = Counted()
    remote = prepare(made(), url, config, run=counted)
    assert len(counted.names) == len(remote.manifest.shards) - 3
    assert remote.fingerprint == local.fingerprint
    remote.verify()
    for row in range(local.index.num_rows):
        own, other = local.pcm(row), pickle.loads(pickle.dumps(remote)).pcm(row)
        assert own is other is None or (own == other).all()
    counted = Counted()
    grown = prepare(made(10), url, config, run=counted)
    assert len(counted.names) < len(grown.manifest.shards)
    grown.verify()
    other = CorpusConfig(codec="flac", labels={"client": ("change",)}, max_rejected=0)
    names = grown.store.names()
    with pytest.raises(DataError, match="has other settings"):
        prepare(made(10), url, other)
    assert grown.store.names() == names
    for name in names:
        grown.store.delete(name)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    for url in ("s3://key:hunter2@bucket/corpus", "s3://bucket/corpus?secret_key=hunter2"):
        with pytest.raises(DataError, match="must not contain credentials") as caught:
            Store(url)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(DataError, match="nowhere://x: the store cannot be opened"):
        Store("nowhere://x")
