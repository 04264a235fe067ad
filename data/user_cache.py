"""The user's cache folder: what can be computed again, and what several sweeps and commands share."""

import os
from pathlib import Path

NAME = "speech-llm-sweep"


def user_cache() -> Path:
    """Return the folder: $SWEEP_CACHE, or `speech-llm-sweep` in the user's cache folder. It may not exist."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / NAME
    return Path(os.environ.get("SWEEP_CACHE", default))
