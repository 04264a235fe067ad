"""`sweep run --dry-run`: what the command would change, resume and start in a folder."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UserError
from model.checkpoints import checkpoint
from model.checkpoints.fingerprint import ALLOW
from sweep.config.diff import Changes, compare
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.space import Values
from sweep.config.version import code_version
from sweep.preflight.earlier_sweeps import learn
from sweep.search.space_checks import check_requests
from sweep.search.space_checks import notes as search_notes
from sweep.search.stopping import total_trials
from sweep.search.study import StudyStore
from sweep.search.study_storage import StudyBases, has_study


@dataclass(frozen=True)
class Preview:
    """What `sweep run` would do."""

    folder: Path
    config: Config
    started: bool  # whether the folder holds a sweep
    changes: Changes
    notes: list[str] = field(default_factory=list)  # about other data or code
    learns: list[str] = field(default_factory=list)  # what the search learns from earlier sweeps
    search: list[str] = field(default_factory=list)  # what the search asks for and is done only in part
    refused: bool = False
    refusal: str = ""  # why, where it is not for `changes`
    resumed: list[tuple[int, str]] = field(default_factory=list)  # number of a trial, and from where
    points: list[Values] = field(default_factory=list)  # points of the search that would start next
    drawn: int = 0  # trials that would be drawn after them
    ended: dict[str, int] = field(default_factory=dict)  # trials by their final state


def preview(
    config: Config,
    folder: Path,
    fingerprint: str | None,
    bases: StudyBases | None = None,
    allow_other_base: bool = False,
) -> Preview:
    """Return what `sweep run` would do in a folder. Takes no lease, writes nothing and starts nothing.

    Args:
        config: the new configuration.
        folder: of the sweep; it need not exist.
        fingerprint: of the corpus; None if the corpus has not been made.
        bases: the models that trials start from, as far as they are known.
        allow_other_base: accept other ones than before.

    Raises:
        UserError: the database of the study cannot be used, or the search asks for what no trial would do.
    """
    check_requests(config, folder)
    path, earlier = folder / "config.yaml", learn(config, folder, fingerprint)
    learns = [] if earlier is None else earlier.lines()
    if not path.exists():
        return _without_trials(config, folder, False, Changes(()), learns)
    before = load(str(path))
    changes = compare(before, config)
    if not has_study(folder, before):
        return _without_trials(config, folder, True, changes, learns)
    try:
        # The previous settings say where the study is stored; the new ones say which trials are left.
        study = StudyStore.read(folder, before.model_copy(update={"search": config.search}))
    except UserError:
        if before.storage.ledger is not None:
            raise
        return _without_trials(config, folder, True, changes, learns)
    notes, former, codes, code = list[str](), study.fingerprint(), study.codes(), code_version()
    other_data = former is not None and fingerprint is not None and former != fingerprint
    if other_data:
        notes.append(f"data: {former} → {fingerprint} (refused: another corpus)")
    other_base = study.other_bases(bases or {})
    if other_base:
        verdict = "results differ from those so far" if allow_other_base else f"refused without {ALLOW}"
        notes.append(f"base models: {other_base} ({verdict})")
    if codes and codes[-1] != code:
        notes.append(f"code: {codes[-1]} → {code} (results may differ from those so far)")
    trials = study.trials()
    new = max(0, total_trials(config, trials) - len(trials))
    points = study.points_left()[:new]
    return Preview(
        folder,
        config,
        started=True,
        changes=changes,
        notes=notes,
        learns=learns,
        search=list(search_notes(config)),
        refused=other_data or bool(changes.refused) or bool(other_base and not allow_other_base),
        refusal="another corpus" if other_data else study.other_bases_message(other_base),
        resumed=[(number, _resume_point(folder, number)) for number in study.running()]
        + [
            (trial.number, f"{_resume_point(folder, trial.number)}, once it is among the best ({trial.why})")
            for trial in trials
            if trial.state == "PAUSED"
        ]
        + [
            (trial.number, f"{_resume_point(folder, trial.number)}; it failed outside its configuration ({trial.why})")
            for trial in study.failed_outside()
        ],
        points=points,
        drawn=new - len(points),
        ended=dict(Counter(trial.state for trial in trials if trial.has_ended and not trial.outside)),
    )


def _without_trials(config: Config, folder: Path, started: bool, changes: Changes, learns: list[str]) -> Preview:
    total = total_trials(config, [])
    points = config.search.points[:total]
    drawn = total - len(points)
    return Preview(
        folder,
        config,
        started,
        changes,
        learns=learns,
        search=list(search_notes(config)),
        refused=bool(changes.refused),
        points=list(points),
        drawn=drawn,
    )


def _resume_point(folder: Path, number: int) -> str:
    """Return from where a trial would resume: its newest valid checkpoint."""
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
