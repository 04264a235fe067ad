"""The study of a sweep at a moment, also while a driver writes it."""

from pathlib import Path

from sweep.config.files import load
from sweep.config.schema import Config
from sweep.search.study import StudyStore, TrialRecord


def config_of(folder: Path) -> Config:
    """Return the configuration of a sweep that has begun."""
    return load(str(folder / "config.yaml"))


def trials(folder: Path) -> dict[int, TrialRecord]:
    """Return every trial by number; none if the sweep has not begun or its study is just being written."""
    try:
        return {trial.number: trial for trial in StudyStore.read(folder, config_of(folder)).trials()}
    except Exception:  # the caller asks again, and in the end without this `except`
        return {}
