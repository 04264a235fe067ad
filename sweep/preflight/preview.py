"""What `sweep run` would do: `--dry-run`."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from sweep.config.diff import Changes, compare
from sweep.config.files import load
from sweep.config.schema import Config
from sweep.config.version import code_version


@dataclass(frozen=True)
class Preview:
    """What `sweep run` would do."""

    folder: Path
    config: Config
    started: bool  # whether the folder holds a sweep
    changes: Changes
    notes: list[str] = field(default_factory=list)  # about data and code; of data, refusals too
    refused: bool = False
    going_on: list[tuple[int, str]] = field(default_factory=list)  # number of a trial, and from where
    points: list[dict[str, Any]] = field(default_factory=list)  # that start next
    drawn: int = 0  # trials that are drawn after them
    ended: dict[str, int] = field(default_factory=dict)  # trials by their final state


def preview(config: Config, folder: Path, fingerprint: str | None) -> Preview:
    """What `sweep run` would do in this folder. Takes no lease, writes nothing, starts nothing.

    Args:
        config: the configuration asked for.
        folder: of the sweep; it may not be there yet.
        fingerprint: of the corpus; None where it is not made yet.

    Raises:
        UserError: the ledger's database cannot be used.
    """
    from sweep.search.study import StudyStore
    from sweep.search.study_storage import has_study

    path = folder / "config.yaml"
    if not path.exists():
        return _fresh(config, folder, started=False, changes=Changes(()))
    before = load(str(path))
    changes = compare(before, config)
    if not has_study(folder, before):
        return _fresh(config, folder, started=True, changes=changes)
    try:
        # Where the trials lie is for the sweep to say, and what is left of them for the new settings.
        study = StudyStore.read(folder, before.model_copy(update={"search": config.search}))
    except UserError:
        if before.storage.ledger is not None:
            raise
        return _fresh(config, folder, started=True, changes=changes)
    known, codes, code = study.fingerprint(), study.codes(), code_version()
    other_data = known is not None and fingerprint is not None and known != fingerprint
    notes = [f"data: {known} → {fingerprint}: another corpus, which is refused"] if other_data else []
    notes += (
        [f"code: {codes[-1]} → {code}: results may differ from those so far"] if codes[-1:] not in ([], [code]) else []
    )
    entries = study.trials()
    new = max(0, config.search.trials - len(entries))
    points = study.points_left()[:new]
    return Preview(
        folder,
        config,
        True,
        changes,
        notes,
        other_data or bool(changes.refused),
        [(number, _place(folder, number)) for number in study.running()],
        points,
        new - len(points),
        dict(Counter(entry.state for entry in entries if entry.state != "RUNNING")),
    )


def _fresh(config: Config, folder: Path, started: bool, changes: Changes) -> Preview:
    """Of a sweep without a trial."""
    points = config.search.points[: config.search.trials]
    return Preview(
        folder,
        config,
        started,
        changes,
        refused=bool(changes.refused),
        points=list(points),
        drawn=config.search.trials - len(points),
    )


def _place(folder: Path, number: int) -> str:
    """From where a trial goes on, by its newest checkpoint that is whole."""
    from model.checkpoints import checkpoint
    from sweep.config.paths import trial_folder

    damaged = ""
    for name in (checkpoint.FILE, checkpoint.PREVIOUS):
        path = trial_folder(folder, number) / name
        if not path.exists():
            continue
        try:
            progress = checkpoint.load(path)["progress"]
            return f"from step {progress['total_steps']}, in epoch {progress['epoch'] + 1}{damaged}"
        except (UserError, KeyError, TypeError, OSError):
            damaged = " (its newest checkpoint is damaged)"
    return f"from its start{damaged}"
