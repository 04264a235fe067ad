"""Where a sweep keeps its files."""

from pathlib import Path


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial of the sweep in `folder` keeps its checkpoint, curves and predictions."""
    return folder / "trials" / f"{number:04d}"


def near(path: Path) -> Path:
    """A path as it is called from here; in full where here is the root, as in a job."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and here != here.parent else path
