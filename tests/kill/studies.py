"""What the ledger of a sweep says at a moment, also while a driver writes it."""

from pathlib import Path

from sweep.config.files import load
from sweep.config.schema import Config
from sweep.search.study import StudyStore, TrialRecord


def config_of(folder: Path) -> Config:
    """Of a sweep that has begun."""
    return load(str(folder / "config.yaml"))


def entries(folder: Path) -> dict[int, TrialRecord]:
    """Every trial by number; none, if the sweep has not begun, or a line of its ledger is just being written."""
    try:
        return {entry.number: entry for entry in StudyStore.read(folder, config_of(folder)).trials()}
    except Exception:  # asked again, and in the end without this mercy
        return {}
