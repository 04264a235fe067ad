"""Errors for users: one line that says what is wrong, where, and what to do. The command line exits with code 2."""

import contextlib
import errno
from collections.abc import Iterable, Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space left, quota exceeded, file size limit exceeded


class UserError(Exception):
    """Bad input or configuration. The message is shown without a traceback."""

    in_every_worker = False  # True if all workers of a trial raise it at the same step
    common = False  # True if other trials of the same sweep would fail in the same way
    reason = "error"  # why a trial failed, in one or two words
    outside = False  # whether the cause is outside the configuration: once it is repaired, the trial may run again


class DataError(UserError):
    """A corpus, shard or example cannot be used."""

    common = True
    outside = True
    reason = "bad data"


class MisfitError(DataError):
    """The corpus does not fit the settings of this trial; it may fit those of other trials."""

    common = False
    outside = False  # a sweep is bound to its corpus


class StorageError(UserError):
    """A file cannot be written or read: the disk is full, rights are missing, or the file system is unavailable."""

    common = True
    outside = True


class ConfigError(UserError):
    """One or more settings are wrong; the message lists all of them."""


class UnavailableError(ConfigError):
    """What a setting names is missing, damaged or out of reach: a model, a file, a device."""

    outside = True


@contextlib.contextmanager
def storing(path: object) -> Iterator[None]:
    """Convert an OSError inside the block into a StorageError about `path`, a file or folder."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(f"{path}: the disk is full; free some space and rerun the same command") from None
        raise StorageError(
            f"{path}: cannot be used ({error.strerror or reason(error)}); check disk, rights and connection, and rerun "
            "the same command"
        ) from None


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names in order, and how many more there are, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "none") + more


def reason(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type, for a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
