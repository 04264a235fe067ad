"""`sweep export`: write a trial as a self-contained folder beside the base models that it names."""

from dataclasses import dataclass
from pathlib import Path

from data.atomic import new_folder, refuse_existing
from data.errors import UserError
from model.checkpoints import peft_export
from model.evaluation.ceiling import ceilings
from sweep.analysis import confirm
from sweep.analysis.evaluate import find_checkpoint, load_trained
from sweep.analysis.predictions import read_predictions
from sweep.config.files import load, write
from sweep.config.paths import shell_command, trial_folder
from sweep.config.resolve import absolute, resolve
from sweep.config.version import code_version
from sweep.export.merged import write_merged
from sweep.export.model_card import CardFacts, model_card
from sweep.search.study import StudyStore
from sweep.search.study_storage import has_study

BEST = "best"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that is exported, and where it comes from."""

    checkpoint: Path
    trial: int | None  # None: it was trained by `sweep train`
    code: str  # version that trained it


def export(source: Path, trial: str, out: Path, allow_other_base: bool = False, merged: bool = False) -> None:
    """Write a trial as PEFT adapter, safetensors, YAML, JSON and a model card.

    Args:
        source: folder of a sweep, or of a trial that was trained alone.
        trial: number of a sweep's trial, or "best".
        out: the new folder; it is complete, or does not exist.
        allow_other_base: accept that a base model has changed since the training.
        merged: write all weights, those of the base models included, as plain transformers loads them.

    Raises:
        UserError: `out` exists, the trial does not exist, its checkpoint was deleted or cannot be used, or its corpus
            or a base model has changed.
    """
    refuse_existing(out)
    origin = _origin(source, trial)
    folder = origin.checkpoint.parent
    config = load(str(folder / "config.yaml"))
    trained = load_trained(origin.checkpoint, resolve(config), (), allow_other_base)
    manifest, confirmation = trained.data.shards.manifest, confirm.read(source)
    facts = CardFacts(
        sweep=config.name,
        trial=origin.trial,
        corpus=manifest.corpus,
        fingerprint=trained.fingerprint,
        roles=manifest.roles,
        code=origin.code,
        epoch=trained.epoch,
        metrics=trained.metrics,
        predictions=read_predictions(folder),
        confirmed=[] if confirmation is None else confirmation.lines(),
        bases=trained.bases,
        bases_are_recorded=trained.bases_are_recorded,
        ceilings=ceilings(trained.data.shards, list(trained.model.tasks), ("val",)),
        classes=merge.describe() if (merge := trained.data.shards.merge) else "",
    )
    card = model_card(trained.model, config, facts, merged)
    exported = peft_export.ExportSource(
        facts.sweep, facts.trial, facts.corpus, facts.fingerprint, facts.roles, trained.bases
    )
    with new_folder(out) as unfinished:
        if merged:
            write_merged(trained.model, unfinished)
        else:
            peft_export.write(trained.model, unfinished, exported)
        write(absolute(config), unfinished / "config.yaml")  # with absolute paths, so it works in any folder
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def _origin(source: Path, trial: str) -> Origin:
    """Find the checkpoint of a trial."""
    if not trial.isdecimal() and trial != BEST:
        raise UserError(f"--trial {trial}: give the number of a trial, or {BEST}")
    path = source / "config.yaml"
    config = load(str(path)) if path.exists() else None
    if config is None or not has_study(source, config):
        if trial != BEST:
            raise UserError(f"--trial {trial}: {source} is no sweep; leave it out for a trial that was trained alone")
        return Origin(find_checkpoint(source), None, f"{code_version()} (at the export)")
    study = StudyStore.read(source, config)
    number = int(trial) if trial != BEST else _best(study, source)
    trials = {record.number: record for record in study.trials()}
    if number not in trials:
        command = shell_command("sweep", "status", source)
        raise UserError(f"--trial {number}: the sweep has no such trial; `{command}` lists them")
    if not trials[number].has_ended:
        raise UserError(f"--trial {number}: it has not ended yet; export it afterwards, or choose another trial")
    codes = " → ".join(study.codes()) or code_version()
    return Origin(find_checkpoint(trial_folder(source, number)), number, codes)


def _best(study: StudyStore, source: Path) -> int:
    """Return the number of the confirmed trial, else of the best one in the search."""
    best, confirmation = study.best(), confirm.read(source)
    if best is None:
        raise UserError(f"{source}: no trial is complete yet; name one with --trial N, or finish the sweep")
    return best.number if confirmation is None else confirmation.chosen.number
