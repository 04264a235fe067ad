"""Where ledgers lie: what kills leave in a journal file, many sweeps in one database, databases that are away."""

import socket
import threading
import time
from pathlib import Path

import pytest

from data.errors import ConfigError, UserError
from sweep.config.files import load
from sweep.config.schema import Config, parse
from sweep.search import study_storage as module
from sweep.search.study import StudyStore
from sweep.search.study_storage import FILE, has_study, sweep_id
from tests.sweep.common import ask, pruned, report, settings, tree
from tests.sweep.stores import Postgres, at, postgres  # noqa: F401 — fixture

SECRET = "hunter2"


def test_a_killed_drivers_lock_and_half_a_line_are_removed(tmp_path: Path) -> None:
    ask(StudyStore.open(tmp_path, settings()), 1)
    (tmp_path / f"{FILE}.lock").touch()  # held for ever
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"op_code": 8, "trial_')  # a full disk
    study = StudyStore.open(tmp_path, settings())
    assert not (tmp_path / f"{FILE}.lock").exists(), "Optuna would wait half a minute for it"
    report(study, 0, 0.5)
    assert StudyStore.open(tmp_path, settings()).trials()[0].curve == {1: 0.5}


def test_looking_on_does_not_touch_the_writers_lock_nor_its_line(tmp_path: Path) -> None:
    writer = StudyStore.open(tmp_path, settings())
    reader = StudyStore.read(tmp_path, settings())
    ask(writer, 1)
    report(writer, 0, 0.5)
    (tmp_path / f"{FILE}.lock").touch()  # held by the writer at this moment
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"op_code": 8, "trial_')  # and its line is on the way
    before = tree(tmp_path)
    for looking in (reader, StudyStore.read(tmp_path, settings())):
        assert looking.trials()[0].curve == {1: 0.5}
    assert tree(tmp_path) == before


def test_what_is_known_already_is_not_written_again(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, pruned())
    ask(study, 1)
    report(study, 0, 0.5, 0.6)
    study.bind("aa", "1")
    before = tree(tmp_path)
    again = StudyStore.open(tmp_path, pruned())
    again.bind("aa", "1")
    report(again, 0, 0.5, 0.6)
    assert tree(tmp_path) == before


def test_an_id_is_made_once_whoever_asks(tmp_path: Path) -> None:
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


def two_sweeps_of_one_name(folder: Path, config: Config) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
    one, other = (StudyStore.open(folder / name, config) for name in ("a", "b"))
    ask(one, 3)
    assert other.trials() == []
    ask(other, 1)
    assert [len(StudyStore.read(folder / name, config).trials()) for name in ("a", "b")] == [3, 1]


def test_sweeps_of_one_name_do_not_mix_in_sqlite(tmp_path: Path) -> None:
    two_sweeps_of_one_name(tmp_path, at(f"sqlite:///{tmp_path / 'shared.db'}", settings()))


def test_sweeps_of_one_name_do_not_mix_in_postgresql(tmp_path: Path, postgres: Postgres) -> None:  # noqa: F811
    two_sweeps_of_one_name(tmp_path, at(postgres.url, settings()))


def test_a_relative_sqlite_file_lies_in_the_sweeps_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = at("sqlite:///ledger.db", settings())
    monkeypatch.chdir(tmp_path)
    Path("s").mkdir()
    ask(StudyStore.open(Path("s"), config), 1)
    monkeypatch.chdir("/")
    assert len(StudyStore.read(tmp_path / "s", config).trials()) == 1
    assert (tmp_path / "s/ledger.db").exists()


def test_looking_at_a_sweep_that_is_not_there_makes_no_file(tmp_path: Path) -> None:
    config = at("sqlite:///ledger.db", settings())
    assert not has_study(tmp_path, config)
    sweep_id(tmp_path)
    with pytest.raises(UserError, match="no trial has started yet"):
        StudyStore.read(tmp_path, config)
    assert list(tree(tmp_path)) == ["sweep-id"]


def test_new_tables_are_made_by_two_sweeps_at_once(tmp_path: Path, postgres: Postgres) -> None:  # noqa: F811
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


def test_a_server_that_is_restarted_is_waited_for(tmp_path: Path) -> None:
    server = Postgres()
    try:
        config = at(server.url, pruned())
        study, reader = StudyStore.open(tmp_path, config), StudyStore.read(tmp_path, config)
        ask(study, 1)
        report(study, 0, 0.1)
        server.stop()
        back = threading.Timer(1.5, server.start)
        back.start()
        started = time.monotonic()
        report(study, 0, 0.1, 0.2)
        assert time.monotonic() - started > 1
        back.join()
        assert reader.trials()[0].curve == {1: 0.1, 2: 0.2}
    finally:
        server.end()


def test_a_server_that_stays_away_ends_the_wait(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import optuna

    monkeypatch.setattr(module, "PATIENCE", 0.5)
    server = Postgres()
    try:
        study = StudyStore.open(tmp_path, at(server.url, settings()))
        server.stop()
        with pytest.raises(optuna.exceptions.StorageInternalError):
            study.ask([], 1)
        server.start()
        assert study.ask([], 1) is not None, "the next call connects again"
    finally:
        server.end()


def test_a_server_that_is_not_there_is_one_error_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        assert "; start the server, or mend the URL" in message
        assert "\n" not in message
        assert SECRET not in message


def test_a_file_that_is_no_database_is_one_error(tmp_path: Path) -> None:
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
        (f"postgresql://me:{SECRET}@host/db", "holds a password"),
        (f"postgresql://me@host/db?password={SECRET}", "holds a password"),
        (f"postgresql://me@host/db?sslpassword={SECRET}", "holds a password"),
        ("mysql://me@host/db", "'mysql://me@host/db' is no database that a ledger can lie in"),
        ("sqlite://", "no database"),
        ("sqlite:///:memory:", "no database"),
        ("postgresql://me@host", "no database"),
        (f"me:{SECRET}@host", "not a URL"),
        (f"postgresql://me:{SECRET}@host:port/db", "not a URL"),
    ],
)
def test_urls_that_cannot_be_used_are_refused_without_their_passwords(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"storage\.ledger: .*{said}") as error:
        parse({"name": "a", "storage": {"ledger": url}}, "a.yaml")
    assert SECRET not in str(error.value)


def test_the_place_of_the_ledger_can_be_set_on_the_command_line() -> None:
    config = load("demo", ["storage.ledger=postgresql://me@host:5432/db", "storage.keep=null"])
    assert (config.storage.ledger, config.storage.keep) == ("postgresql://me@host:5432/db", None)
