"""The console that all commands print to, and the line that reports an error.

A corpus may hold control characters, which a terminal would obey; both outputs show them escaped, as `\\x1b`.
"""

import io
import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

ASCII = str.maketrans({"→": "->", "⏎": "\\n", "│": "|", "·": ".", "■": "#", "…": "..."})
CONTROL = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class PlainConsole(Console):
    """A console that escapes control characters, and writes ASCII where the encoding has nothing else."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape a text; rich calls this for table cells and printed strings before it measures them."""
        text = text.translate(ASCII) if self.options.ascii_only else text
        return super().render_str(text.translate(CONTROL), **options)


# In a file or a pipe, tables have the width of a wide terminal, unless COLUMNS says otherwise.
console = PlainConsole(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 132)


def quiet_libraries() -> None:
    """Keep transformers and huggingface_hub, once they are imported, from printing warnings and progress bars."""
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)


def print_line(text: object) -> None:
    """Print a text as it is, without markup and line breaks."""
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)


def replace_unprintable() -> None:
    """Print characters that the encoding of a stream lacks as escapes, where Python would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def complain(message: object) -> None:
    """Print why a command failed to stderr."""
    sys.stderr.write(f"error: {message}\n".translate(CONTROL))
