"""Where the ledger lies: a journal file in the sweep's folder, or a database that several sweeps may share."""

import contextlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from data.atomic import UNFINISHED, create_file
from data.errors import UserError, reason
from sweep.config.schema import Config

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

FILE = "study.journal"
CREATE_STUDY = 0  # what Optuna writes as the `op_code` of the line that begins a study
CONNECT_SECONDS = 10  # for one attempt
PATIENCE = 60.0  # seconds that a running sweep waits for a database that went away
FIRST_ATTEMPTS = 3  # two sweeps may make the tables of a new database at the same moment, and one of them fails


def sweep_id(folder: Path) -> str:
    """Names a sweep for ever, on any machine that sees its folder; made on the first call, complete or not at all."""
    path = folder / "sweep-id"
    if not path.exists():
        create_file(path, uuid.uuid4().hex, temporary=path.with_name(f"sweep-id{UNFINISHED}{uuid.uuid4().hex}"))
    return path.read_text().strip()


def has_study(folder: Path, config: Config) -> bool:
    """Whether a ledger may be there to be read; asks no server."""
    return (folder / (FILE if config.storage.ledger is None else "sweep-id")).exists()


def open_study(folder: Path, config: Config) -> optuna.Study:
    """The sweep's study for writing, made if it is not there. Only the holder of the folder's lease may do this.

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
    # Asking first, so that opening a finished sweep writes nothing.
    with contextlib.suppress(KeyError):
        return optuna.load_study(study_name=name, storage=storage)
    _refuse_headless(folder, config)
    return optuna.create_study(study_name=name, storage=storage, direction=config.search.direction)


def read_study(folder: Path, config: Config) -> optuna.Study:
    """The sweep's study to look at, also while a driver writes it; nothing is written.

    Raises:
        UserError: there is none, the database cannot be used, or the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    none = UserError(f"{folder}: no trial has started yet; start with `sweep run`")
    if not has_study(folder, config):
        raise none
    try:
        if config.storage.ledger is None:
            return optuna.load_study(study_name=config.name, storage=_journal(folder / FILE))
        url = _url(config.storage.ledger, folder)
        if not _has_tables(url):
            raise none
        return optuna.load_study(study_name=_shared_name(folder, config), storage=_database(url, create=False))
    except KeyError:
        _refuse_headless(folder, config)
        raise none from None


def _shared_name(folder: Path, config: Config) -> str:
    """Other sweeps of the same name may lie in the same database."""
    return f"{config.name}-{sweep_id(folder)}"


def _repair(folder: Path) -> None:
    """Nobody else writes, so a lock file is what a killed driver left, and so is half a line at the end."""
    for leftover in folder.glob(f"{FILE}.lock*"):
        leftover.unlink(missing_ok=True)
    path = folder / FILE
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _journal(path: Path) -> JournalStorage:
    """The storage of a journal, which is read here.

    Raises:
        UserError: a line of it is none of Optuna's.
    """
    backend = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
    try:
        return JournalStorage(backend)
    except OSError:
        raise
    except Exception as error:  # of any kind, by what the line holds
        raise _damaged(path, f"{type(error).__name__}: {reason(error)}") from None


def _refuse_headless(folder: Path, config: Config) -> None:
    """Without the line that begins the study, Optuna would pass over all others, and the trials would be lost.

    The line itself is looked at, since a driver may write it after somebody has looked for the study.
    """
    path = folder / FILE
    if config.storage.ledger is None and path.exists():
        with path.open("rb") as file:
            first = file.readline()
        if first.endswith(b"\n") and json.loads(first)["op_code"] != CREATE_STUDY:
            raise _damaged(path, f"no line begins the study {config.name}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged ledger ({what}); put a copy of it back, or choose another folder with --out")


def _url(text: str, folder: Path) -> "URL":
    """The URL with the driver that is installed; a relative SQLite file lies in the sweep's folder."""
    from sqlalchemy import make_url

    url = make_url(text)
    if url.get_backend_name() == "sqlite":
        return url.set(drivername="sqlite", database=str(folder.absolute() / str(url.database)))
    return url.set(drivername="postgresql+psycopg")


def _engine_options(url: "URL") -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}  # seconds to wait for another process's lock
    # A connection that died while it lay idle is noticed before it is used.
    own = {"connect_timeout": CONNECT_SECONDS, "application_name": "speech-llm-sweep", "client_encoding": "utf8"}
    return {"pool_pre_ping": True, "pool_size": 2, "connect_args": own}


def _has_tables(url: "URL") -> bool:
    """Whether a ledger was ever written to the database.

    Raises:
        UserError: it cannot be reached.
    """
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.exc import SQLAlchemyError

    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        return False  # connecting would make the file
    try:
        engine = create_engine(url, **_engine_options(url))
        try:
            return bool(inspect(engine).has_table("version_info"))
        finally:
            engine.dispose()
    except SQLAlchemyError as error:
        raise _unusable(url, error) from None


def _database(url: "URL", create: bool) -> RDBStorage:
    from sqlalchemy.exc import SQLAlchemyError

    known: tuple[type[Exception], ...] = (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError)
    text = url.render_as_string(hide_password=False)
    for attempt in range(1, FIRST_ATTEMPTS + 1):
        try:
            storage = RDBStorage(text, engine_kwargs=_engine_options(url), skip_table_creation=not create)
        except known as error:
            raced = not isinstance(error, RuntimeError) and "already exists" in str(error.__cause__ or error)
            if attempt == FIRST_ATTEMPTS or not (raced and create):
                raise _unusable(url, error) from None
            time.sleep(0.5 * attempt)
        else:
            _be_patient(storage.engine)
            return storage
    raise AssertionError


def _unusable(url: "URL", error: BaseException) -> UserError:
    """What went wrong, in a line; the URL of a configuration holds no password."""
    cause = error.__cause__ or error
    shown = url.set(drivername=url.get_backend_name()).render_as_string()
    return UserError(
        f"storage.ledger: {shown}: cannot be used ({reason(getattr(cause, 'orig', None) or cause)}); "
        "start the server, or mend the URL or the password ($PGPASSWORD, ~/.pgpass)"
    )


def _be_patient(engine: "Engine") -> None:
    """From now on, a server that is away is tried again for `PATIENCE` seconds.

    This covers all that happens between two transactions, which take milliseconds. One that is cut off in its middle
    raises `optuna.exceptions.StorageInternalError` and ends the attempt: nobody knows whether it was carried out, and
    the next attempt reads that from the ledger.
    """
    from sqlalchemy import event

    def connect(dialect: Any, _record: Any, args: Any, options: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return dialect.connect(*args, **options)
            except dialect.loaded_dbapi.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    event.listen(engine, "do_connect", connect)
