"""Storage of studies: what kills leave in a journal, many sweeps in one database, databases that are away."""

import socket
import threading
from pathlib import Path

import pytest

from data.errors import ConfigError, UserError
from sweep.config.files import load
from sweep.config.schema import parse
from sweep.search import study_storage as module
from sweep.search.study import StudyStore
from sweep.search.study_storage import FILE, has_study, sweep_id
from tests.sweep.common import ask, pruned, report, settings, tree
from tests.sweep.stores import Postgres, at, postgres  # noqa: F401 — fixture

SECRET = "hunter2"


def test_only_the_writer_repairs_lock_and_half_line(tmp_path: Path) -> None:
    """A dead driver leaves them; while a reader looks, they may belong to a living one."""
    writer, reader = StudyStore.open(tmp_path, settings()), StudyStore.read(tmp_path, settings())
    ask(writer, 1)
    report(writer, 0, 0.5)
    (tmp_path / f"{FILE}.lock").touch()
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"op_code": 8, "trial_')
    before = tree(tmp_path)
    for study in (reader, StudyStore.read(tmp_path, settings())):
        assert study.trials()[0].curve == {1: 0.5}
    assert tree(tmp_path) == before
    study = StudyStore.open(tmp_path, settings())
    assert not (tmp_path / f"{FILE}.lock").exists(), "Optuna would wait half a minute for it"
    report(study, 0, 0.5, 0.6)
    assert StudyStore.open(tmp_path, settings()).trials()[0].curve == {1: 0.5, 2: 0.6}


def test_repeated_reports_write_nothing(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 1)
    report(study, 0, 0.5, 0.6)
    study.bind("aa", "1")
    before = tree(tmp_path)
    again = StudyStore.open(tmp_path, pruned())
    again.bind("aa", "1")
    report(again, 0, 0.5, 0.6)
    assert tree(tmp_path) == before


def test_sweep_id_is_created_once_by_many_threads(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    found: list[str] = []

    def make() -> None:
        together.wait()
        found.append(sweep_id(tmp_path))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {(tmp_path / "sweep-id").read_text()}
    assert list(tree(tmp_path)) == ["sweep-id"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_sweeps_of_one_name_stay_apart(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}" if kind == "sqlite" else request.getfixturevalue("postgres").url
    config = at(url, settings())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (StudyStore.open(tmp_path / name, config) for name in ("a", "b"))
    ask(first, 3)
    assert second.trials() == []
    ask(second, 1)
    assert [len(StudyStore.read(tmp_path / name, config).trials()) for name in ("a", "b")] == [3, 1]


def test_relative_sqlite_path_is_in_the_sweep_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a study that does not exist creates no file there."""
    config, folder = at("sqlite:///study.db", settings()), tmp_path / "s"
    folder.mkdir()
    assert not has_study(folder, config)
    sweep_id(folder)
    with pytest.raises(UserError, match="no trial has started yet"):
        StudyStore.read(folder, config)
    assert list(tree(folder)) == ["sweep-id"]
    monkeypatch.chdir(tmp_path)
    ask(StudyStore.open(Path("s"), config), 1)
    monkeypatch.chdir("/")
    assert len(StudyStore.read(folder, config).trials()) == 1
    assert (folder / "study.db").exists()


def test_two_sweeps_create_the_tables_at_once(tmp_path: Path, postgres: Postgres) -> None:  # noqa: F811
    import psycopg

    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute("create database fresh")
    config = at(postgres.url.replace("/postgres", "/fresh"), settings())
    together, failed = threading.Barrier(4), []

    def start(folder: Path) -> None:
        folder.mkdir()
        together.wait()
        try:
            ask(StudyStore.open(folder, config), 1)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start, args=(tmp_path / str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [len(StudyStore.read(tmp_path / str(number), config).trials()) for number in range(4)] == [1] * 4


def test_server_that_is_away_is_retried_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    server = Postgres()
    try:
        config = at(server.url, pruned())
        study, reader = StudyStore.open(tmp_path, config), StudyStore.read(tmp_path, config)
        ask(study, 1)
        server.stop()
        with monkeypatch.context() as patch, pytest.raises(optuna.exceptions.StorageInternalError):
            patch.setattr(module, "PATIENCE", 0.2)
            report(study, 0, 0.1)
        back = threading.Timer(1.0, server.start)
        back.start()
        report(study, 0, 0.1, 0.2)
        back.join()
        assert reader.trials()[0].curve == {1: 0.1, 2: 0.2}
    finally:
        server.end()


def test_unreachable_server_is_one_error_without_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = at(f"postgresql://me@127.0.0.1:{port}/sweeps", settings())
    sweep_id(tmp_path)
    for work in (StudyStore.open, StudyStore.read):
        with pytest.raises(UserError) as error:
            work(tmp_path, config)
        message = str(error.value)
        assert message.startswith(f"storage.ledger: postgresql://me@127.0.0.1:{port}/sweeps: cannot be used (")
        assert "refused" in message
        assert "; start the server, or fix the URL" in message
        assert "\n" not in message
        assert SECRET not in message


def test_file_that_is_no_database_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("hello, this is no database" * 100)
    for url, said in {
        "sqlite:///ledger.db": "not a database",
        "sqlite:////no/such/folder/x.db": "unable to open",
    }.items():
        with pytest.raises(UserError, match=rf"storage\.ledger: sqlite:.*cannot be used \(.*{said}.*\)"):
            StudyStore.open(tmp_path, at(url, settings()))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"postgresql://me:{SECRET}@host/db", "contains a password"),
        (f"postgresql://me@host/db?password={SECRET}", "contains a password"),
        (f"postgresql://me@host/db?sslpassword={SECRET}", "contains a password"),
        ("mysql://me@host/db", "'mysql://me@host/db' is not a database for a study"),
        ("sqlite://", "not a database"),
        ("sqlite:///:memory:", "not a database"),
        ("postgresql://me@host", "not a database"),
        (f"me:{SECRET}@host", "not a URL"),
        (f"postgresql://me:{SECRET}@host:port/db", "not a URL"),
    ],
)
def test_unusable_urls_are_refused_without_passwords(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"storage\.ledger: .*{said}") as error:
        parse({"name": "a", "storage": {"ledger": url}}, "a.yaml")
    assert SECRET not in str(error.value)


def test_storage_can_be_set_on_the_command_line() -> None:
    config = load("demo", ["storage.ledger=postgresql://me@host:5432/db", "storage.keep=null"])
    assert (config.storage.ledger, config.storage.keep) == ("postgresql://me@host:5432/db", None)
