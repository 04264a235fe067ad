"""Errors meant for users: one line that says what, where and what to do. The command line exits with 2 on them."""

from collections.abc import Iterable


class UserError(Exception):
    """Bad input or configuration. The message is complete: no traceback is shown with it."""

    in_every_worker = False  # whether all workers of a trial raise it at the same step


class DataError(UserError):
    """A corpus, shard or example cannot be used as it is."""


class ConfigError(UserError):
    """One or more settings are wrong; the message lists them all."""


def listed(names: Iterable[str], most: int = 3) -> str:
    """Names for a message: the first ones, and how many more there are."""
    known = sorted(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return (", ".join(known[:most]) or "none") + more


def reason(error: BaseException) -> str:
    """An exception in one line, for a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
