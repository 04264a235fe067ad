"""The check of a tracking URI before the first trial: one that can never work is refused, an unavailable one is not."""

import importlib.util
import os
import socket
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.errors import UserError, reason

DATABASES = ("postgresql", "mysql", "mssql")  # that MLflow writes to, apart from sqlite
USE = "use http://HOST:PORT of an MLflow server, or sqlite:////FOLDER/mlflow.db, or unset it for a file beside --out"
MAGIC = b"SQLite format 3\0"


def check_uri(uri: str) -> None:
    """Refuse a tracking URI that no MLflow client of this environment can use.

    Raises:
        UserError: it cannot work, whatever runs at its other end.
    """
    if (why := fault(uri)) is not None:
        name = "MLFLOW_TRACKING_URI " if os.environ.get("MLFLOW_TRACKING_URI") else "MLflow's file "
        raise UserError(f"{name}{uri}: {why}")


def fault(uri: str) -> str | None:
    """Return why a tracking URI can never work, and what to do; None if it may work."""
    url = urlsplit(uri)
    # As MLflow reads it: these two words are addresses too.
    scheme = uri if uri in ("databricks", "uc") else url.scheme.partition("+")[0]
    if scheme in ("http", "https"):
        return _server_fault(url.hostname)
    if scheme == "sqlite":
        name = uri.partition(":///")[2].partition("?")[0]
        return _file_fault(unquote(name) if "+" in url.scheme else name)  # as `sqlite_uri` writes it
    if scheme in DATABASES:
        return _driver_fault(uri)
    if scheme in ("", "file"):
        allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("1", "true")
        return None if allowed else f"MLflow does not write to folders any more; {USE}"
    if scheme == "databricks":
        found = importlib.util.find_spec("databricks") is not None and importlib.util.find_spec("databricks.sdk")
        return None if found else "needs the package databricks-sdk, which is not installed; install it"
    return f"MLflow knows no such address; {USE}"


def _server_fault(host: str | None) -> str | None:
    if not host:
        return f"names no host; {USE}"
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"the host {host} is not known here ({reason(error)}); fix the name, or the network of this machine"
    return None


def _file_fault(name: str) -> str | None:
    """Return why a database file cannot be written; write nothing that stays."""
    if not name:
        return f"names no file; {USE}"
    path = Path(name)
    try:
        if path.exists():
            with path.open("r+b") as file:
                head = file.read(len(MAGIC))
            return None if head in (b"", MAGIC) else f"{path} is not a database of SQLite; name another file"
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return f"cannot be written ({reason(error)}); set MLFLOW_TRACKING_URI, or --out, to a folder that can"


def _driver_fault(uri: str) -> str | None:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        hint = "; or write postgresql+psycopg://" if uri.startswith("postgresql://") else ""
        return f"needs the package {error.name}, which is not installed; install it{hint}"
    except (ArgumentError, NoSuchModuleError) as error:
        return f"cannot be read ({reason(error)}); {USE}"
    return None
