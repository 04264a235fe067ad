"""Retention of checkpoints: which ones a sweep keeps, and the disk space that they need."""

import shutil
from pathlib import Path
from typing import NamedTuple

from data.errors import StorageError
from data.formats import format_bytes
from model.checkpoints.checkpoint import DAMAGED, FILE, PREVIOUS
from model.checkpoints.fencing import TrialLock
from sweep.config.paths import share_folder, trial_folder
from sweep.config.schema import Config
from sweep.config.search import SHARES
from sweep.search.sampling.ties import reserved
from sweep.search.study import StudyStore, best_first

BYTES_PER_PARAMETER = 3 * 4  # of a parameter that trains: itself in fp32, and the two moments of AdamW
COPIES = 3  # of a running trial: the checkpoint, the previous one, and the next one while it is written
OVERHEAD = 2**20  # other bytes of a checkpoint: random states, history, names


class DiskNeed(NamedTuple):
    """Bytes that the checkpoints of a sweep need."""

    each: int
    total: int  # at most


def prune_checkpoints(study: StudyStore, folder: Path) -> list[int]:
    """Delete the checkpoints of ended trials, except those of the best `storage.keep` complete ones and their seeds.

    Nothing of running trials is deleted. Of a paused trial the last checkpoint is kept, from which it continues.
    Repeating it, also after a kill, deletes the rest or nothing.

    Returns:
        Numbers of the trials whose checkpoints this call has deleted.

    Raises:
        StorageError: a file cannot be deleted.
    """
    if study.config.storage.keep is None:
        return []
    trials = study.trials()
    kept = {trial.number for trial in best_first(study.config, trials)[: study.config.storage.keep]}
    kept |= {trial.number for trial in trials if trial.state == "PAUSED" or trial.repeats in kept}
    idle = [trial.number for trial in trials if trial.state != "RUNNING"]
    return [number for number in idle if _delete(trial_folder(folder, number), keep_last=number in kept)]


def _delete(folder: Path, keep_last: bool) -> bool:
    """Delete a trial's checkpoints, or all except the last one; return whether the last one was deleted."""
    parts = [part for share in SHARES if (part := share_folder(folder, share)) == folder or part.exists()]
    outdated = [path for part in parts for path in (part / PREVIOUS, *part.glob(DAMAGED.format("*")))]
    last = [part / FILE for part in parts]
    doomed = [path for path in (*outdated, *(() if keep_last else last)) if path.exists()]
    if not doomed:
        return False
    # A worker that was given up for lost may still be training: the lock keeps it from writing anything.
    with TrialLock.claim(folder).writing():
        for path in doomed:  # the last checkpoint goes last: while it exists, the work is not done
            path.unlink(missing_ok=True)
    return any(path in doomed for path in last)


def disk_need(config: Config, trained_parameters: int, concurrent: int) -> DiskNeed:
    """Return the disk space that the checkpoints of a sweep need.

    Args:
        config: of the sweep.
        trained_parameters: number of parameters that train in the largest trial.
        concurrent: trials that run at the same time.
    """
    each = BYTES_PER_PARAMETER * trained_parameters + OVERHEAD
    trials, running = config.search.trials, min(concurrent, config.search.trials)
    keeps_all = config.storage.keep is None or (config.search.rule is not None and config.search.rule.kind == "promote")
    ended = trials - running if keeps_all else min((config.storage.keep or 0) + reserved(config), trials)
    return DiskNeed(each, each * (COPIES * running + ended))


def check_disk(folder: Path, need: DiskNeed) -> str:
    """Compare the need with the free space; existing checkpoints of the sweep are part of the need.

    Returns:
        A line about both, for the user.

    Raises:
        StorageError: the free space is smaller.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    used = sum(path.stat().st_size for path in folder.glob("trials/*/checkpoint*"))
    line = (
        f"checkpoints: up to {format_bytes(need.total)} ({format_bytes(need.each)} each); {format_bytes(free)} are free"
    )
    if need.total - used > free:
        raise StorageError(
            f"{folder}: {line}; free some space, use --out on another disk, or lower storage.keep or resources.slots"
        )
    return line
