"""Preparation: atomic, resumable after a kill, and incremental when a corpus grows."""

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
from data.preparation import shard_jobs
from data.preparation.build import prepare
from data.preparation.shard_jobs import ShardJob, serially
from data.shards.dataset import Shards
from data.shards.format import ShardFile
from data.shards.store import Store


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_jobs, "SHARD_BYTES", 1 << 16)


def small(sessions: int = 8) -> Corpus:
    return synthetic.corpus(sessions=sessions, turns=6, seed=1)


class Counted:
    """Runs shard jobs and records their names; it can interrupt the preparation after some of them."""

    def __init__(self, limit: int | None = None) -> None:
        self.names: list[str] = []
        self.limit = limit

    def __call__(self, jobs: Sequence[ShardJob]) -> Iterator[ShardFile]:
        for job in jobs:
            if len(self.names) == self.limit:
                raise KeyboardInterrupt
            self.names.append(job.name)
            yield from serially([job])

    def written(self, shards: Shards) -> set[str]:
        return {name for shard in shards.manifest.shards if shard.name in self.names for name in shard.conversations}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


def test_interrupted_preparation_resumes(tmp_path: Path) -> None:
    """Complete shards are reused, an incomplete one and temporary files are not."""
    whole = prepare(small(), tmp_path / "whole")
    folder, first, second = tmp_path / "cut", Counted(3), Counted()
    with pytest.raises(KeyboardInterrupt):
        prepare(small(), folder, run=first)
    with pytest.raises(DataError, match="no manifest"):
        Shards(folder)
    torn = folder / first.names[1]
    torn.write_bytes(torn.read_bytes()[:-100])
    (folder / ".shard-00.arrow.unfinished-1").write_bytes(b"half")
    resumed = prepare(small(), folder, run=second)
    assert {*first.names, *second.names} == {shard.name for shard in whole.manifest.shards}
    assert set(first.names) & set(second.names) == {torn.name}
    assert resumed.fingerprint == whole.fingerprint
    assert files(folder) == files(tmp_path / "whole")
    assert not list(folder.glob(".*"))
    third = Counted()
    assert prepare(small(), folder, run=third).fingerprint == whole.fingerprint
    assert third.names == []


def test_added_sessions_are_written_and_keep_the_split(tmp_path: Path) -> None:
    before = prepare(small(8), tmp_path / "shards")
    old = dict(zip(before.columns["conversation"], before.columns["split"], strict=True))
    counted = Counted()
    after = prepare(small(12), tmp_path / "shards", run=counted)
    new = dict(zip(after.columns["conversation"], after.columns["split"], strict=True))
    assert old.items() <= new.items()
    assert counted.written(after) == new.keys() - old.keys()
    assert after.fingerprint != before.fingerprint
    assert sum(after.manifest.sessions.values()) == 12
    after.verify()
    listed = {after.manifest.index, "manifest.json", "findings.jsonl", *(shard.name for shard in after.manifest.shards)}
    assert {path.name for path in (tmp_path / "shards").iterdir()} == listed


def test_only_changed_and_corrupt_shards_are_written(tmp_path: Path) -> None:
    shards = prepare(small(), tmp_path / "shards")
    damaged = tmp_path / "shards" / shards.manifest.shards[-1].name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    corpus, counted = small(), Counted()
    corpus.conversations[0].turns[0].text = "something else"
    for turn in corpus.conversations[1].turns:
        turn.where = "moved:1"  # a row was inserted above; the content is the same
    shards = prepare(corpus, tmp_path / "shards", run=counted)
    assert counted.written(shards) == {"c000", *shards.manifest.shards[-1].conversations}
    assert shards.columns["where"][shards.columns["conversation"].index("c001")] == "moved:1"
    assert shards.columns["text"][shards.columns["id"].index("c000/0")] == "something else"
    shards.verify()


def test_source_without_earlier_content_is_refused(tmp_path: Path) -> None:
    """The source must be the whole corpus: a source with only new sessions would remove the others."""
    before = prepare(small(8), tmp_path / "shards")
    with pytest.raises(DataError, match=r"2 of its sessions are not in the source, which must have all: c006, c007"):
        prepare(small(6), tmp_path / "shards")
    silent = small(8)
    for turn in (turn for conversation in silent.conversations for turn in conversation.turns):
        turn.audio = None
    with pytest.raises(DataError, match="it has audio, but the source has none; give --audio as before"):
        prepare(silent, tmp_path / "shards")
    with pytest.raises(DataError, match=r"has other settings .*codec: 'pcm16' → 'flac'"):
        prepare(small(8), tmp_path / "shards", CorpusConfig(codec="flac"))
    before.verify()
    prepare(small(8), tmp_path / "shards", CorpusConfig(max_rejected=0.5))
    assert Shards(tmp_path / "shards").fingerprint == before.fingerprint


def test_failed_addition_leaves_the_corpus_unchanged(tmp_path: Path) -> None:
    before = prepare(small(8), tmp_path / "shards")
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    grown = small(10)
    grown.conversations[9].turns[1].label = "nonsense"
    with pytest.raises(DataError, match="F_REJECTED"):
        prepare(grown, tmp_path / "shards")
    counted = Counted()

    def fail(jobs: Sequence[ShardJob]) -> Iterator[ShardFile]:
        yield from counted(jobs)
        raise DataError("the last shard cannot be written")

    with pytest.raises(DataError, match="the last shard"):
        prepare(small(10), tmp_path / "shards", run=fail)
    assert counted.names
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == names
    before.verify()


def test_folder_is_locked_and_progress_is_reported(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []

    def meanwhile(jobs: Sequence[ShardJob]) -> Iterator[ShardFile]:
        with pytest.raises(DataError, match="another `sweep prepare` is running here"):
            prepare(small(), tmp_path / "shards")
        yield from serially(jobs)

    prepare(small(), tmp_path / "shards", run=meanwhile, progress=lambda done, total: progress.append((done, total)))
    assert (progress[0], progress[-1]) == ((0, 8), (8, 8))
    assert progress == sorted(progress)


def test_recording_that_a_worker_cannot_see_fails(tmp_path: Path) -> None:
    corpus = small()
    soundfile.write(tmp_path / "x.wav", np.zeros(160_000), SAMPLE_RATE)
    corpus.conversations[3].recording = tmp_path / "x.wav"

    def elsewhere(jobs: Sequence[ShardJob]) -> Iterator[ShardFile]:
        (tmp_path / "x.wav").unlink()
        return serially(jobs)

    with pytest.raises(DataError, match=r"x\.wav: the recording is not visible on this node"):
        prepare(corpus, tmp_path / "shards", run=elsewhere)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_path_that_cannot_be_used_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"cannot be used \(.*; check path, rights and connection"):
        prepare(small(), tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_folder_with_other_files_is_not_changed(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="exists already and is not a corpus"):
        prepare(small(), f"{scheme}{tmp_path}")
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "manifest.json"]


def test_unusable_corpus_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 session.*add sessions"):
        prepare(synthetic.corpus(sessions=2, turns=6), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def _prepare_slowly(folder: Path) -> None:
    def slow(jobs: Sequence[ShardJob]) -> Iterator[ShardFile]:
        for job in jobs:
            yield from serially([job])
            time.sleep(0.05)

    shard_jobs.SHARD_BYTES = 1 << 16
    prepare(small(), folder, run=slow)


def test_preparation_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    whole = prepare(small(), tmp_path / "whole")
    context, folder, kills = multiprocessing.get_context("forkserver"), tmp_path / "killed", 0
    context.set_forkserver_preload(["tests.data.test_prepare"])
    for attempt in range(5):
        process = context.Process(target=_prepare_slowly, args=(folder,))
        process.start()
        time.sleep(0.15 + 0.1 * attempt)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert not (folder / "manifest.json").exists() or Shards(folder).fingerprint == whole.fingerprint
    assert kills > 0
    resumed = prepare(small(), folder)
    resumed.verify()
    assert resumed.fingerprint == whole.fingerprint


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket on a local server."""
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
def test_store_behind_a_url_has_the_same_content(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("s3") if kind == "s3" else "memory://bucket/corpus"
    config = CorpusConfig(codec="flac")
    local = prepare(small(4), tmp_path / "local", config)
    with pytest.raises(KeyboardInterrupt):
        prepare(small(4), url, config, run=Counted(2))
    with pytest.raises(DataError, match="no manifest"):
        Shards(url)
    counted = Counted()
    remote = prepare(small(4), url, config, run=counted)
    assert len(counted.names) == len(remote.manifest.shards) - 2
    assert remote.fingerprint == local.fingerprint
    remote.verify()
    copy = pickle.loads(pickle.dumps(remote))
    for row in range(local.index.num_rows):
        expected, clip = local.pcm(row), copy.pcm(row)
        assert expected is clip is None or (expected == clip).all()
    counted = Counted()
    grown = prepare(small(6), url, config, run=counted)
    assert counted.written(grown) == {"c004", "c005"}
    names = grown.store.names()
    with pytest.raises(DataError, match="has other settings"):
        prepare(small(6), url, CorpusConfig(codec="flac", labels={"client": ("change",)}, max_rejected=0))
    assert grown.store.names() == names
    for name in names:
        grown.store.delete(name)


def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    for url in ("s3://key:hunter2@bucket/corpus", "s3://bucket/corpus?secret_key=hunter2"):
        with pytest.raises(DataError, match="must not contain credentials") as caught:
            Store(url)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(DataError, match="nowhere://x: the store cannot be opened"):
        Store("nowhere://x")
