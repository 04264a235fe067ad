"""Which checkpoints of a sweep are kept, and what they take on the disk."""

import shutil
from pathlib import Path
from typing import NamedTuple

from data.errors import StorageError
from data.formats import format_bytes
from model.checkpoints.checkpoint import DAMAGED, FILE, PREVIOUS
from model.checkpoints.fencing import TrialLock
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.search.pruning import better
from sweep.search.study import StudyStore, TrialRecord

NUMBERS = 3 * 4  # bytes of a parameter that trains: fp32, and as much for each of AdamW's two moments
COPIES = 3  # of a running trial: the checkpoint, the one before, and the next one while it is written
OTHER = 2**20  # bytes of a checkpoint beside that: generators, history, names


class DiskNeed(NamedTuple):
    """Bytes that the checkpoints of a sweep take."""

    each: int
    total: int  # at most


def prune_checkpoints(study: StudyStore, folder: Path) -> list[int]:
    """Delete the checkpoints of ended trials, but for the best `storage.keep` complete ones.

    Of running trials nothing is touched, and of all others configuration, curves and predictions stay. To do it again,
    also after a kill in the middle, changes nothing or does the rest.

    Returns:
        The trials whose checkpoints were deleted now.

    Raises:
        StorageError: a file cannot be deleted.
    """
    if study.config.storage.keep is None:
        return []
    entries = study.trials()
    kept = _best(entries, study.config.search.direction, study.config.storage.keep)
    ended = [entry.number for entry in entries if entry.state != "RUNNING"]
    return [number for number in ended if _delete(trial_folder(folder, number), keep_last=number in kept)]


def _best(entries: list[TrialRecord], direction: str, count: int) -> set[int]:
    """Numbers of the best complete trials; on a tie the earlier one."""
    done = [entry for entry in entries if entry.state == "COMPLETE" and entry.value is not None]
    ranked: list[TrialRecord] = []
    for entry in done:  # by number
        value = entry.value or 0.0
        place = sum(not better(value, other.value or 0.0, direction) for other in ranked)
        ranked.insert(place, entry)
    return {entry.number for entry in ranked[:count]}


def _delete(folder: Path, keep_last: bool) -> bool:
    """Delete a trial's checkpoints, or those beside the last one; whether the last one was deleted."""
    beside = [folder / PREVIOUS, *folder.glob(DAMAGED.format("*"))]
    doomed = [path for path in (*beside, *(() if keep_last else (folder / FILE,))) if path.exists()]
    if not doomed:
        return False
    # A worker that was given up for lost may still be training: from here on it can write nothing.
    with TrialLock.claim(folder).writing():
        for path in doomed:  # the last one last: as long as it is there, the work is not done
            path.unlink(missing_ok=True)
    return folder / FILE in doomed


def disk_need(config: Config, trained_parameters: int, slots: int) -> DiskNeed:
    """What the checkpoints of a sweep take on the disk.

    Args:
        config: of the sweep.
        trained_parameters: of the largest trial.
        slots: trials that run at the same time.
    """
    each = NUMBERS * trained_parameters + OTHER
    trials, running = config.search.trials, min(slots, config.search.trials)
    ended = trials - running if config.storage.keep is None else min(config.storage.keep, trials)
    return DiskNeed(each, each * (COPIES * running + ended))


def check_disk(folder: Path, need: DiskNeed) -> str:
    """The need and what is free, in a line; checkpoints that the sweep has already are part of the need.

    Raises:
        StorageError: there is less.
    """
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    had = sum(path.stat().st_size for path in folder.glob("trials/*/checkpoint*"))
    said = (
        f"checkpoints: up to {format_bytes(need.total)} ({format_bytes(need.each)} each); {format_bytes(free)} are free"
    )
    if need.total - had > free:
        raise StorageError(
            f"{folder}: {said}; free some space, use --out on another disk, or lower storage.keep or resources.slots"
        )
    return said
