"""The user's cache folder: what can be computed again, and what several sweeps and commands share."""

import contextlib
import functools
import os
import tempfile
from pathlib import Path

NAME = "speech-llm-sweep"


def user_cache() -> Path:
    """Return the folder: $SWEEP_CACHE, or `speech-llm-sweep` in the user's cache folder. It may not exist."""
    return Path(os.environ.get("SWEEP_CACHE") or cache_home() / NAME)


def cache_home() -> Path:
    """Return the user's cache folder; one in the temporary folder where the home folder cannot be written."""
    return _writable_cache(os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


@functools.lru_cache(maxsize=1)
def _writable_cache(given: str | None, _home: str | None) -> Path:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder is known
        folder = Path(given) if given else Path.home() / ".cache"
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            return folder
    folder = Path(tempfile.gettempdir()) / f"speech-llm-sweep-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            return folder
    return Path(tempfile.mkdtemp(prefix="speech-llm-sweep-"))


def use_writable_caches() -> None:
    """Let libraries keep their caches elsewhere where the home folder cannot be written."""
    cache = cache_home()
    with contextlib.suppress(RuntimeError):
        if cache == Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"):
            return
    folders = {"XDG_CACHE_HOME": "", "MPLCONFIGDIR": "matplotlib", "TRITON_CACHE_DIR": "triton"}
    with contextlib.suppress(RuntimeError, OSError):
        if not (Path.home() / ".cache/huggingface").is_dir():  # models may be there, on a disk that is only read
            folders["HF_HOME"] = "huggingface"
    for name, folder in folders.items():
        os.environ.setdefault(name, str(cache / folder))
