"""Import the libraries of optional extras."""

from importlib import import_module
from types import ModuleType

from data.errors import DataError


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
