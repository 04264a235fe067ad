"""Storage of the study: a journal file in the sweep's folder, or a database that several sweeps may share."""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from data.atomic import UNFINISHED, create_file
from data.errors import UserError, reason
from model.checkpoints.fingerprint import BaseIdentity
from sweep.compat import CREATE_STUDY, VERSION_TABLE
from sweep.config.schema import Config

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

# What identifies the models that trials start from, by setting and by its value in the configuration.
StudyBases = Mapping[str, Mapping[str, BaseIdentity]]
FILE = "study.journal"
CONNECT_SECONDS = 10  # timeout of one attempt to connect
PATIENCE = 60.0  # seconds that a running sweep waits for a database that went away
CREATE_ATTEMPTS = 3  # when two sweeps create the tables of a new database at the same moment, one of them fails


def sweep_id(folder: Path) -> str:
    """Return the permanent id of a sweep, the same on all machines that see its folder; create it on the first call."""
    path = folder / "sweep-id"
    if not path.exists():
        create_file(path, uuid.uuid4().hex, temporary=path.with_name(f"sweep-id{UNFINISHED}{uuid.uuid4().hex}"))
    return path.read_text().strip()


def has_study(folder: Path, config: Config) -> bool:
    """Return whether a study may exist; ask no server."""
    return (folder / (FILE if config.storage.ledger is None else "sweep-id")).exists()


def open_study(folder: Path, config: Config) -> optuna.Study:
    """Open the sweep's study for writing; create it if it does not exist.

    Only the holder of the folder's lease may do this.

    Raises:
        UserError: the database cannot be used, or the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if config.storage.ledger is None:
        _repair(folder)
        storage: BaseStorage = _journal(folder / FILE)
        name = config.name
    else:
        storage = _database(_url(config.storage.ledger, folder), create=True)
        name = _shared_name(folder, config)
    # Try to load first, so that opening a finished sweep writes nothing.
    with contextlib.suppress(KeyError):
        return optuna.load_study(study_name=name, storage=storage)
    _refuse_headless(folder, config)
    return optuna.create_study(study_name=name, storage=storage, direction=config.search.direction)


def read_study(folder: Path, config: Config) -> optuna.Study:
    """Open the sweep's study for reading, also while a driver writes it; write nothing.

    Raises:
        UserError: there is none, the database cannot be used, or the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    missing = UserError(f"{folder}: no trial has started yet; start with `sweep run`")
    if not has_study(folder, config):
        raise missing
    try:
        if config.storage.ledger is None:
            return optuna.load_study(study_name=config.name, storage=_journal(folder / FILE))
        url = _url(config.storage.ledger, folder)
        if not _has_tables(url):
            raise missing
        return optuna.load_study(study_name=_shared_name(folder, config), storage=_database(url, create=False))
    except KeyError:
        _refuse_headless(folder, config)
        raise missing from None


def _shared_name(folder: Path, config: Config) -> str:
    """Return the name of the study in a database, which may hold other sweeps of the same name."""
    return f"{config.name}-{sweep_id(folder)}"


def _repair(folder: Path) -> None:
    """Remove the lock file and the half line that a killed driver left; nothing else writes now."""
    for leftover in folder.glob(f"{FILE}.lock*"):
        leftover.unlink(missing_ok=True)
    path = folder / FILE
    if path.exists():
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(path, complete)


def _journal(path: Path) -> JournalStorage:
    """Return the storage of a journal; Optuna reads the file here.

    Raises:
        UserError: a line of it is not Optuna's.
    """
    backend = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
    try:
        return JournalStorage(backend)
    except OSError:
        raise
    except Exception as error:  # its type depends on what the line holds
        raise _damaged(path, f"{type(error).__name__}: {reason(error)}") from None


def _refuse_headless(folder: Path, config: Config) -> None:
    """Raise a UserError where a journal does not begin with its study.

    Optuna would skip all other lines, and the trials would be lost. The line itself is read, because a driver may write
    it after a reader has looked for the study.
    """
    path = folder / FILE
    if config.storage.ledger is None and path.exists():
        with path.open("rb") as file:
            first = file.readline()
        if first.endswith(b"\n") and json.loads(first)["op_code"] != CREATE_STUDY:
            raise _damaged(path, f"its first line does not create the study {config.name}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged study ({what}); restore a copy of the file, or choose another folder with --out")


def _url(text: str, folder: Path) -> "URL":
    """Parse a URL and set the driver that is installed; a relative SQLite path is relative to the sweep's folder."""
    from sqlalchemy import make_url

    url = make_url(text)
    if url.get_backend_name() == "sqlite":
        return url.set(drivername="sqlite", database=str(folder.absolute() / str(url.database)))
    return url.set(drivername="postgresql+psycopg")


def _engine_options(url: "URL") -> dict[str, object]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}  # seconds to wait for another process's lock
    # A connection whose other end is gone without a word ends after `PATIENCE`, and not after the hours of TCP.
    alive = {"keepalives_idle": 10, "keepalives_interval": 10, "keepalives_count": 3}
    arguments: dict[str, object] = {**alive, "tcp_user_timeout": int(PATIENCE * 1000)}
    arguments |= {"connect_timeout": CONNECT_SECONDS, "application_name": "speech-llm-sweep", "client_encoding": "utf8"}
    # The ping replaces a connection that died while it was idle.
    return {"pool_pre_ping": True, "pool_size": 2, "connect_args": arguments}


def _has_tables(url: "URL") -> bool:
    """Return whether Optuna has ever written to the database.

    Raises:
        UserError: it cannot be reached.
    """
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.exc import SQLAlchemyError

    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        return False  # connecting would create the file
    try:
        engine = create_engine(url, **_engine_options(url))
        try:
            return bool(inspect(engine).has_table(VERSION_TABLE))
        finally:
            engine.dispose()
    except SQLAlchemyError as error:
        raise _unusable(url, error) from None


def _database(url: "URL", create: bool) -> RDBStorage:
    from sqlalchemy.exc import SQLAlchemyError

    errors: tuple[type[Exception], ...] = (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError)
    text = url.render_as_string(hide_password=False)
    for attempt in range(1, CREATE_ATTEMPTS + 1):
        try:
            storage = RDBStorage(text, engine_kwargs=_engine_options(url), skip_table_creation=not create)
        except errors as error:
            raced = not isinstance(error, RuntimeError) and "already exists" in str(error.__cause__ or error)
            if attempt == CREATE_ATTEMPTS or not (raced and create):
                raise _unusable(url, error) from None
            time.sleep(0.5 * attempt)
        else:
            _retry_connections(storage.engine)
            return storage
    raise AssertionError


def _unusable(url: "URL", error: BaseException) -> UserError:
    """Return a one-line error about a database; the URL of a configuration holds no password."""
    cause = error.__cause__ or error
    address = url.set(drivername=url.get_backend_name()).render_as_string()
    return UserError(
        f"storage.ledger: {address}: cannot be used ({reason(getattr(cause, 'orig', None) or cause)}); "
        "start the server, or fix the URL or the password ($PGPASSWORD, ~/.pgpass)"
    )


def _retry_connections(engine: "Engine") -> None:
    """Let an engine retry a server that is away for `PATIENCE` seconds.

    This covers whatever happens between two transactions, which take milliseconds. A transaction that is cut off raises
    `optuna.exceptions.StorageInternalError` and ends this run of the sweep: whether it was carried out is unknown, and
    the next run reads it from the study.
    """
    from sqlalchemy import event
    from sqlalchemy.engine.default import DefaultDialect

    def connect(dialect: DefaultDialect, _record: object, args: list[Any], options: dict[str, Any]) -> object:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return dialect.connect(*args, **options)
            except dialect.loaded_dbapi.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    event.listen(engine, "do_connect", connect)


def stored_bases(study: optuna.Study) -> dict[str, dict[str, BaseIdentity]]:
    """Return the models that the trials of a study start from; none in studies of earlier versions."""
    return {setting: identities(by_value) for setting, by_value in study.user_attrs.get("bases", {}).items()}


def changed_bases(study: optuna.Study, bases: StudyBases) -> str:
    """Return which models are not those that the study was started with, in words; empty if all are."""
    former = stored_bases(study)
    changed = [
        f"{setting} {value} was {former[setting][value]} and is now {base}"
        for setting, by_value in bases.items()
        for value, base in by_value.items()
        if value in former.get(setting, {}) and former[setting][value].digest != base.digest
    ]
    return "; ".join(changed)


def store_bases(study: optuna.Study, bases: StudyBases) -> None:
    """Store the models, beside those of other values of an axis; earlier identities of a model are kept, too."""
    stored = dict(study.user_attrs.get("bases", {}))
    dumped = {
        setting: {value: base.model_dump() for value, base in by_value.items()} for setting, by_value in bases.items()
    }
    merged = stored | {setting: stored.get(setting, {}) | by_value for setting, by_value in dumped.items()}
    if merged == stored:
        return
    if stored and changed_bases(study, bases):
        study.set_user_attr("former_bases", [*study.user_attrs.get("former_bases", []), stored])
    study.set_user_attr("bases", merged)


def identities(stored: Mapping[str, object]) -> dict[str, BaseIdentity]:
    """Return models as they were stored, by name."""
    return {name: BaseIdentity.model_validate(base) for name, base in stored.items()}
