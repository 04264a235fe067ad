"""`sweep export`: a trial as a folder that stands alone, beside the base models that it names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import new_folder, refuse_existing
from data.errors import UserError
from model.checkpoints import peft_export as exported
from sweep.analysis import confirm
from sweep.analysis.evaluate import find_checkpoint, load_trained
from sweep.analysis.results import read_predictions
from sweep.config.files import load, write
from sweep.config.paths import trial_folder
from sweep.config.resolve import absolute, resolve
from sweep.config.version import code_version
from sweep.export.model_card import Figures, model_card
from sweep.search.study import StudyStore
from sweep.search.study_storage import has_study

BEST = "best"


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from."""

    checkpoint: Path
    trial: int | None  # None: it was trained alone
    code: str  # version that trained it


def export(source: Path, trial: str, out: Path) -> None:
    """Write a trial as PEFT, safetensors, YAML, JSON and a model card.

    Args:
        source: folder of a sweep, or of a trial that was trained alone.
        trial: number of a sweep's trial, or "best".
        out: is written whole or not at all.

    Raises:
        UserError: `out` exists, there is no such trial, its checkpoint was not kept or cannot be used, or its corpus
            has changed.
    """
    refuse_existing(out)
    origin = _origin(source, trial)
    folder = origin.checkpoint.parent
    config = load(str(folder / "config.yaml"))
    model, data, state = load_trained(origin.checkpoint, resolve(config), ())
    manifest = data.shards.manifest
    said: dict[str, Any] = {"sweep": config.name, "trial": origin.trial, "corpus": manifest.corpus}
    said |= {"fingerprint": state["fingerprint"], "roles": manifest.roles}
    card = model_card(
        model, config, said, origin.code, _figures(state, folder, (confirm.read(source) or {"lines": []})["lines"])
    )
    with new_folder(out) as unfinished:
        exported.write(model, unfinished, said)
        write(absolute(config), unfinished / "config.yaml")  # it holds from any folder
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def _figures(state: dict[str, Any], folder: Path, confirmed: list[str]) -> Figures:
    history = state["progress"]["history"]
    epoch, metrics = history[-1] if history else (0, {})
    return Figures(epoch, metrics, read_predictions(folder), confirmed)


def _origin(source: Path, trial: str) -> Origin:
    """What is meant by a folder and the number of a trial."""
    if not trial.isdecimal() and trial != BEST:
        raise UserError(f"--trial {trial}: give the number of a trial, or {BEST}")
    path = source / "config.yaml"
    config = load(str(path)) if path.exists() else None
    if config is not None and has_study(source, config):
        study = StudyStore.read(source, config)
        number = _number(study, source, trial)
        codes = " → ".join(study.codes()) or code_version()
        return Origin(find_checkpoint(trial_folder(source, number)), number, codes)
    if trial != BEST:
        raise UserError(f"--trial {trial}: {source} is no sweep; leave it out for a trial that was trained alone")
    return Origin(find_checkpoint(source), None, f"{code_version()} (at the export)")


def _number(study: StudyStore, source: Path, trial: str) -> int:
    number = int(trial) if trial != BEST else _chosen(study, source)
    states = {entry.number: entry.state for entry in study.trials()}
    if number not in states:
        raise UserError(f"--trial {number}: the sweep has no such trial; `sweep status {source}` shows them")
    if states[number] == "RUNNING":
        raise UserError(f"--trial {number}: it has not ended yet; export it afterwards, or choose another one")
    return number


def _chosen(study: StudyStore, source: Path) -> int:
    """The one that was confirmed, else the best of the search."""
    best, confirmed = study.best(), confirm.read(source)
    if best is None:
        raise UserError(f"{source}: no trial is complete yet; name one with --trial N, or finish the sweep")
    return best.number if confirmed is None else int(confirmed["ranked"][0]["number"])
