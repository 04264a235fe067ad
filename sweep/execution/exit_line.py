"""The last line of a command whose process is ended at once: by the kernel, by another process, or by Ray's core.

Such a process can write nothing any more. A small shell waits for its end and writes the line for it.
"""

import contextlib
import subprocess
from collections.abc import Iterator

# The shell reads one line. It gets none if the process ends without writing it.
SCRIPT = 'trap "" HUP INT TERM USR1; read -r ended; [ -n "$ended" ] || printf "%s\\n" "$1" >&2'
END_SECONDS = 5.0  # until the shell has ended


@contextlib.contextmanager
def exit_line(line: str) -> Iterator[None]:
    """Write a line to stderr if the process is ended at once inside the block."""
    try:
        command, pipe = ["/bin/sh", "-c", SCRIPT, "sh", line], subprocess.PIPE
        shell = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError:  # an image without a shell
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            shell.communicate(b"ended\n", timeout=END_SECONDS)
