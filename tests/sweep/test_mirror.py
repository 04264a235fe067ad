"""The copy of a sweep in a store: another machine goes on from it, one at a time, and nothing stale comes back."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.errors import DataError
from data.shards.store import Store
from sweep.config.paths import trial_folder
from sweep.durability import lease, mirror
from sweep.durability.lease import LeaseHeldError, LeaseLostError
from sweep.durability.mirror import below, mirrored
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
    """A driver that ends in order."""
    with keep(folder, url) as own:
        assert own.finish(20), own.error


def content(folder: Path) -> dict[str, bytes]:
    names = (*mirror.ROOT, *(f"trials/*/{name}" for name in mirror.TRIAL))
    paths = [path for name in names for path in folder.glob(name)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wrote the copy was another machine."""
    boots = iter(f"boot-{number}" for number in range(99))
    monkeypatch.setattr(lease, "boot", lambda: next(boots))


def test_another_machine_goes_on_from_the_copy(url: str, tmp_path: Path) -> None:
    begin(one := tmp_path / "one")
    leave(one, url)
    (two := tmp_path / "two").mkdir()
    said: list[str] = []
    with keep(two, url, said.append) as own:
        assert content(two) == content(one)
        study = StudyStore.open(two, CONFIG)
        assert [entry.state for entry in study.trials()] == ["COMPLETE", "RUNNING"]
        assert study.ask([], 4) == StudyStore.read(one, CONFIG).ask([], 4)
        report(study, 1, 0.4, 0.7)
        (trial_folder(two, 0) / "checkpoint.pt").unlink()
        assert own.finish(20), own.error
    assert [line for line in said if line.startswith("fetching")]
    (three := tmp_path / "three").mkdir()
    leave(three, url)
    assert content(three) == content(two)
    assert "trials/0000/checkpoint.pt" not in content(three)


def test_a_machine_that_comes_back_drops_what_did_not_count(tmp_path: Path, url: str) -> None:
    begin(one := tmp_path / "one")
    leave(one, url)
    (two := tmp_path / "two").mkdir()
    with keep(two, url) as own:
        report(StudyStore.open(two, CONFIG), 1, 0.4, 0.9)
        assert own.finish(20)
    report(StudyStore.open(one, CONFIG), 1, 0.4, 0.1)  # it had gone on for a while without the store
    (trial_folder(one, 7)).mkdir()
    leave(one, url)
    assert content(one) == content(two)
    assert not trial_folder(one, 7).exists()


def test_the_same_machine_keeps_what_the_copy_lacks(tmp_path: Path) -> None:
    url = "memory://bucket/same"
    begin(one := tmp_path / "one")
    leave(one, url)
    report(StudyStore.open(one, CONFIG), 1, 0.4, 0.9)  # and was killed before the copy had it
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
def test_a_writer_that_lives_is_not_replaced_and_a_dead_one_is(tmp_path: Path) -> None:
    url = "memory://bucket/lives"
    begin(one := tmp_path / "one")
    (two := tmp_path / "two").mkdir()
    with keep(one, url) as own:
        with pytest.raises(LeaseHeldError, match="another machine works on this sweep"), keep(two, url, patience=2.0):
            pass
        assert content(two) == {}
        assert own.is_alive()
        own.owner = own.owner  # from here on it is silent, as after a power cut
        own.lost.set()
        own.join(5)
        with keep(two, url) as other:
            assert content(two) == content(one)
            own.lost.clear()
            with pytest.raises(LeaseLostError):
                own._beat(last=False)
            assert other.finish(10)


def test_a_driver_whose_copy_was_taken_over_stops(tmp_path: Path) -> None:
    url = "memory://bucket/lost"
    begin(one := tmp_path / "one")
    with keep(one, url) as own:
        own.check()
        other = lease.ourselves()
        while own.is_alive():  # its own heartbeat may come just after
            mirror._write_owner(Store(url), other, 9, open_=True)
            own.join(0.1)
        with pytest.raises(LeaseLostError, match="another machine took this sweep over"):
            own.check()
        assert not own.finish(1)


def test_a_store_that_is_away_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(one := tmp_path / "one")
    with keep(one, "memory://bucket/away") as own:
        original = Store.write
        away = [True]

        def write(self: Store, name: str, data: bytes) -> None:
            if away[0]:
                raise DataError("bucket: cannot be used")
            original(self, name, data)

        monkeypatch.setattr(Store, "write", write)
        while own.error is None:
            own.join(0.02)
        assert not own.finish(0.3)
        away[0] = False
        own.join(10)
        assert own.complete
    (two := tmp_path / "two").mkdir()
    leave(two, "memory://bucket/away")
    assert content(two) == content(one)


def test_nothing_leaves_the_folder(tmp_path: Path) -> None:
    url = "memory://bucket/evil"
    begin(one := tmp_path / "one")
    leave(one, url)
    for place, name in (("trials/..", "config.yaml"), ("trials/x", "config.yaml"), ("trials/0000", "run.sh")):
        fsspec.filesystem("memory").pipe(f"/bucket/evil/{place}/{name}", b"evil")
    (two := tmp_path / "two").mkdir()
    leave(two, url)
    assert b"evil" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_settings_that_cannot_work_are_told(here: Path) -> None:
    for wrong, why in (
        ("storage.mirror=/data/copy", "is no store"),
        ("storage={mirror: 's3://b/p', ledger: 'sqlite:///l.db'}", "a ledger in SQLite is not copied"),
    ):
        assert why in complaint(sweep("run", "good.yaml", "--set", wrong))
    shutil.rmtree("runs", ignore_errors=True)


def test_options_of_a_url_stay_at_its_end() -> None:
    assert below("s3://bucket/a?region=x", "trials/0001") == "s3://bucket/a/trials/0001?region=x"
    assert below("s3://bucket/a/", "trials") == "s3://bucket/a/trials"
    assert below("s3://bucket/a?x=1", "") == "s3://bucket/a?x=1"
