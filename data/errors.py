"""Errors meant for users: one line that says what, where and what to do. The command line exits with 2 on them."""

import contextlib
import errno
from collections.abc import Iterable, Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, a user's share of it used up, a limit on a file's size


class UserError(Exception):
    """Bad input or configuration. The message is complete: no traceback is shown with it."""

    in_every_worker = False  # whether all workers of a trial raise it at the same step
    common = False  # whether other trials of the same sweep would meet it, too
    reason = "error"  # why a trial failed, in a word or two


class DataError(UserError):
    """A corpus, shard or example cannot be used as it is."""

    common = True
    reason = "bad data"


class MisfitError(DataError):
    """The corpus does not go with the settings of this trial; it may go with those of another."""

    common = False


class StorageError(UserError):
    """A file cannot be written or read: a full disk, missing rights, a file system that is gone."""

    common = True


class ConfigError(UserError):
    """One or more settings are wrong; the message lists them all."""


@contextlib.contextmanager
def storing(place: object) -> Iterator[None]:
    """Tell what the system says about files in `place` as a StorageError.

    Raises:
        StorageError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(f"{place}: the disk is full; free some space and give the same command again") from None
        raise StorageError(
            f"{place}: cannot be used ({error.strerror or reason(error)}); check disk, rights and connection, and give "
            "the same command again"
        ) from None


def listed(names: Iterable[str], most: int = 3) -> str:
    """Names for a message: the first ones, and how many more there are."""
    known = sorted(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return (", ".join(known[:most]) or "none") + more


def reason(error: BaseException) -> str:
    """An exception in one line, for a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
