"""Paths of the files of a sweep, and how paths stand in URIs and in commands that a user pastes into a shell."""

import shlex
from pathlib import Path
from urllib.parse import quote


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder with the checkpoint, metrics log and predictions of a trial of the sweep in `folder`."""
    return folder / "trials" / f"{number:04d}"


def share_folder(trial: Path, share: float) -> Path:
    """Return the folder of a trial's training on a share of the training groups; the whole is the trial's folder."""
    return trial if share == 1 else trial / f"share-{share:g}"


def near(path: Path) -> Path:
    """Return a path relative to the working directory; an absolute one if that is the root, as in a Ray job."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and here != here.parent else path


def shell_command(*words: str | Path) -> str:
    """Return a command as a POSIX shell reads it; paths are given relative to the working directory, see `near`."""
    return " ".join(shlex.quote(_argument(word) if isinstance(word, Path) else word) for word in words)


def _argument(path: Path) -> str:
    """Return a path that no program takes for an option."""
    text = str(near(path))
    return f"./{text}" if text.startswith("-") else text


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite database as SQLAlchemy 2.1 reads it: a `?` ends the path, and `%` starts an escape.

    A path with such characters is quoted, and the URI then names the driver: MLflow 3.17 takes what follows `sqlite:///`
    for a plain path, and would create the folder of the quoted name.
    """
    quoted = quote(str(path), safe=" +/")
    return f"sqlite:///{path}" if quoted == str(path) else f"sqlite+pysqlite:///{quoted}"
