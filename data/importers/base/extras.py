"""Import the libraries of optional extras, and check the files of Excel and Word before they read them."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

from data.errors import DataError

OLD = b"\xd0\xcf\x11\xe0"  # first bytes of files with a password, and of those before 2007


def import_extra(module: str, extra: str, source: object) -> ModuleType:
    """Import a library that only one format needs.

    Args:
        module: its name.
        extra: the optional extra of this project that installs it.
        source: what should be read, for the message.

    Raises:
        DataError: the library is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{source}: reading it needs {error.name}; install it with: pip install 'speech-llm-sweep[{extra}]'"
        ) from None


def check_package(path: Path, program: str, suffix: str, largest: int, advice: str) -> int:
    """Return the bytes that a file of Excel or Word unpacks to.

    Args:
        path: the file.
        program: that writes such files.
        suffix: of such files.
        largest: bytes above which it is refused.
        advice: what to do then.

    Raises:
        DataError: it has a password, is of a version before 2007, or is too large.
        OSError, BadZipFile: it cannot be read, or is no such file.
    """
    with path.open("rb") as file:
        if file.read(len(OLD)) == OLD:
            raise DataError(
                f"{path.name}: has a password, or is of {program} before 2007; save it as {suffix} without a password"
            )
    with ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > largest:
        raise DataError(f"{path.name}: unpacks to {size:,} bytes{advice}")
    return size
