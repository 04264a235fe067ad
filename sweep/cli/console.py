"""What the command line writes to: the console and the line for errors.

Words of a corpus may hold control characters, which a terminal would obey; both show them escaped, as `\\x1b`.
"""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

CONTROL = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class PlainConsole(Console):
    """A console that no text can steer."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The cells of tables and all that is printed pass here before they are measured."""
        return super().render_str(text.translate(CONTROL), **options)


# Into a file or a pipe, tables keep the width of a wide terminal.
console = PlainConsole(width=None if sys.stdout.isatty() else 132)


def complain(message: object) -> None:
    """Say on stderr why a command ends."""
    sys.stderr.write(f"error: {message}\n".translate(CONTROL))
