"""Paths of the files of a sweep."""

from pathlib import Path


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder with the checkpoint, metrics log and predictions of a trial of the sweep in `folder`."""
    return folder / "trials" / f"{number:04d}"


def near(path: Path) -> Path:
    """Return a path relative to the working directory; an absolute one if that is the root, as in a Ray job."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and here != here.parent else path
