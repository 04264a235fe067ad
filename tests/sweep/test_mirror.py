"""The mirror of a sweep: one machine at a time resumes from it, and nothing stale comes back."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.errors import DataError
from data.shards.store import Store
from sweep.config.paths import trial_folder
from sweep.durability import heartbeat, mirror
from sweep.durability.heartbeat import Heartbeat, LeaseHeldError, LeaseLostError
from sweep.durability.mirror import OwnerFile, below, mirrored
from sweep.search.study import StudyStore
from tests.sweep.common import ask, complaint, report, settings, sweep

CONFIG = settings(trials=4)


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "s3":
        yield request.getfixturevalue("s3_url")
        return
    yield "memory://bucket/sweep"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def s3_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bucket")
    yield f"s3://bucket/sweep?scheme=http&endpoint_override={host}:{port}&allow_delayed_open=true"
    server.stop()


def begin(folder: Path) -> StudyStore:
    """A sweep with an ended and a running trial."""
    folder.mkdir()
    (folder / "config.yaml").write_text("name: test\n")
    study = StudyStore.open(folder, CONFIG)
    ask(study, 2)
    report(study, 0, 0.5, 0.6)
    study.complete(0)
    report(study, 1, 0.4)
    for number in (0, 1):
        (place := trial_folder(folder, number)).mkdir(parents=True)
        for name in ("config.yaml", "checkpoint.pt", "metrics.jsonl"):
            (place / name).write_bytes(f"{name} of {number}".encode())
    return study


def keep(folder: Path, url: str, say: Any = print, **times: float) -> Any:
    return mirrored(folder, url, say, **({"every": 0.05, "patience": 0.4, "settle": 0.05} | times))


def leave(folder: Path, url: str) -> None:
    """Run a driver that releases the mirror."""
    with keep(folder, url) as writer:
        assert writer.finish(20), writer.error


def content(folder: Path) -> dict[str, bytes]:
    names = (*mirror.ROOT, *(f"trials/*/{name}" for name in mirror.TRIAL))
    paths = [path for name in names for path in folder.glob(name)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every hold be of another machine."""
    boots = iter(f"boot-{number}" for number in range(99))
    monkeypatch.setattr(heartbeat, "boot_id", lambda: next(boots))


def test_another_machine_resumes_from_the_mirror(url: str, tmp_path: Path) -> None:
    begin(one := tmp_path / "one")
    leave(one, url)
    (two := tmp_path / "two").mkdir()
    lines: list[str] = []
    with keep(two, url, lines.append) as writer:
        assert content(two) == content(one)
        study = StudyStore.open(two, CONFIG)
        assert [trial.state for trial in study.trials()] == ["COMPLETE", "RUNNING"]
        assert study.ask([], 4) == StudyStore.read(one, CONFIG).ask([], 4)
        report(study, 1, 0.4, 0.7)
        (trial_folder(two, 0) / "checkpoint.pt").unlink()
        assert writer.finish(20), writer.error
    assert [line for line in lines if line.startswith("fetching")]
    (three := tmp_path / "three").mkdir()
    leave(three, url)
    assert content(three) == content(two)
    assert "trials/0000/checkpoint.pt" not in content(three)


def test_returning_machine_drops_what_did_not_count(tmp_path: Path) -> None:
    url = "memory://bucket/returning"
    begin(one := tmp_path / "one")
    leave(one, url)
    (two := tmp_path / "two").mkdir()
    with keep(two, url) as writer:
        report(StudyStore.open(two, CONFIG), 1, 0.4, 0.9)
        assert writer.finish(20)
    report(StudyStore.open(one, CONFIG), 1, 0.4, 0.1)  # it had continued for a while without the store
    (trial_folder(one, 7)).mkdir()
    leave(one, url)
    assert content(one) == content(two)
    assert not trial_folder(one, 7).exists()


def test_same_machine_keeps_what_the_mirror_lacks(tmp_path: Path) -> None:
    url = "memory://bucket/same"
    begin(one := tmp_path / "one")
    leave(one, url)
    report(StudyStore.open(one, CONFIG), 1, 0.4, 0.9)  # and was killed before it was copied
    before = content(one)
    leave(one, url)
    assert content(one) == before
    (two := tmp_path / "two").mkdir()
    leave(two, url)
    assert content(two) == before


def test_only_what_changed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    original = Store.write
    monkeypatch.setattr(Store, "write", lambda self, name, data: (written.append(name), original(self, name, data)))
    begin(one := tmp_path / "one")
    leave(one, "memory://bucket/few")
    assert written.count("checkpoint.pt") == 2
    written.clear()
    (trial_folder(one, 1) / "checkpoint.pt").write_bytes(b"a later one")
    leave(one, "memory://bucket/few")
    assert sorted(set(written)) == ["checkpoint.pt", mirror.OWNER]
    assert written.count("checkpoint.pt") == 1


@pytest.mark.usefixtures("dead")
def test_only_a_dead_writer_is_replaced(tmp_path: Path) -> None:
    url = "memory://bucket/lives"
    begin(one := tmp_path / "one")
    (two := tmp_path / "two").mkdir()
    with keep(one, url) as writer:
        with (
            pytest.raises(LeaseHeldError, match="another `sweep run` is working on this sweep"),
            keep(two, url, patience=2.0),
        ):
            pass
        assert content(two) == {}
        assert writer.is_alive()
        writer.heartbeat.lost.set()  # from here on it is silent, as after a power cut
        writer.join(5)
        with keep(two, url) as other:
            assert content(two) == content(one)
            writer.heartbeat.lost.clear()
            with pytest.raises(LeaseLostError):
                writer.heartbeat.beat()
            assert other.finish(10)


def test_driver_stops_when_its_mirror_is_taken_over(tmp_path: Path) -> None:
    url = "memory://bucket/lost"
    begin(one := tmp_path / "one")
    with keep(one, url) as writer:
        writer.check()
        Store(url).delete(mirror.OWNER)
        while OwnerFile(url).load() is None:  # the next heartbeat restores it
            writer.join(0.02)
        writer.check()
        other = Heartbeat(owner := OwnerFile(url), one)
        while writer.is_alive():  # its own heartbeat may come just after
            owner.write(other.holder)
            writer.join(0.1)
        with pytest.raises(LeaseLostError, match="another process took this sweep over"):
            writer.check()
        assert not writer.finish(1)


def test_unreachable_store_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(one := tmp_path / "one")
    with keep(one, "memory://bucket/away") as writer:
        original = Store.write
        away = [True]

        def write(self: Store, name: str, data: bytes) -> None:
            if away[0]:
                raise DataError("bucket: cannot be used")
            original(self, name, data)

        monkeypatch.setattr(Store, "write", write)
        while writer.error is None:
            writer.join(0.02)
        assert not writer.finish(0.3)
        away[0] = False
        writer.join(10)
        assert writer.complete
    (two := tmp_path / "two").mkdir()
    leave(two, "memory://bucket/away")
    assert content(two) == content(one)


def test_mirror_writes_nothing_outside_the_folder(tmp_path: Path) -> None:
    url = "memory://bucket/evil"
    begin(one := tmp_path / "one")
    leave(one, url)
    for place, name in (("trials/..", "config.yaml"), ("trials/x", "config.yaml"), ("trials/0000", "run.sh")):
        fsspec.filesystem("memory").pipe(f"/bucket/evil/{place}/{name}", b"evil")
    (two := tmp_path / "two").mkdir()
    leave(two, url)
    assert b"evil" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_unusable_mirror_settings_are_refused(here: Path) -> None:
    for wrong, why in (
        ("storage.mirror=/data/copy", "is not the URL of a store"),
        ("storage={mirror: 's3://b/p', ledger: 'sqlite:///l.db'}", "a SQLite database is not copied"),
    ):
        assert why in complaint(sweep("run", "good.yaml", "--set", wrong))
    shutil.rmtree("runs", ignore_errors=True)


def test_options_stay_at_the_end_of_a_url() -> None:
    assert below("s3://bucket/a?region=x", "trials/0001") == "s3://bucket/a/trials/0001?region=x"
    assert below("s3://bucket/a/", "trials") == "s3://bucket/a/trials"
    assert below("s3://bucket/a?x=1", "") == "s3://bucket/a?x=1"
