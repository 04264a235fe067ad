"""`sweep evaluate`: a checkpoint on a split, in this process, from the shards on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus.schema import SPLITS
from data.errors import UserError
from model.checkpoints import checkpoint
from model.evaluation.evaluator import evaluate
from model.evaluation.metrics import Record, per_label, summarise
from model.evaluation.split_data import TrialData
from model.speech_llm.speech_llm import SpeechLLM
from model.training import metrics_log as curve
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.execution.trial import available_device, build
from sweep.search.study import StudyStore


@dataclass(frozen=True)
class Predicted:
    """What a model says about a split."""

    records: list[Record]
    labels: dict[str, tuple[str, ...]]  # by task
    roles: Mapping[str, Sequence[str]]  # who may carry which label


def predict(source: Path, split: str, batch_size: int | None = None, overrides: Sequence[str] = ()) -> Predicted:
    """Predict a split.

    Args:
        source: a sweep's folder (its best trial), a trial's folder, or a checkpoint file beside its config.yaml.
        split: train, val or test.
        batch_size: items computed at once; by default as many as `train.token_budget` allows.
        overrides: settings of the data as key=value, for controls: the trained model under another sound or history.

    Raises:
        UserError: there is no such checkpoint or split, the corpus is another one, or other settings are given.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split}: unknown; use one of {', '.join(SPLITS)}")
    path = find_checkpoint(source)
    other = [override for override in overrides if not override.startswith(("data.", "train.token_budget="))]
    if other:
        raise UserError(f"--set {other[0]}: only data.* can be changed for a trained model")
    config = resolve(load(str(path.with_name("config.yaml")), overrides))
    model, data, _ = load_trained(path, config, (split,))
    records = evaluate(model, data, split, config.train.token_budget, batch_size)
    labels = {task: tuple(known.labels) for task, known in model.tasks.items()}
    return Predicted(records, labels, data.shards.manifest.roles)


def evaluate_checkpoint(
    source: Path, split: str, batch_size: int | None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Predict a split, see `predict`.

    Returns:
        `n`, the metrics, `per_label` by task, and `predictions` with the log-probability of every label.
    """
    said = predict(source, split, batch_size, overrides)
    records, labels = said.records, said.labels
    predictions = [
        {
            "id": record.id,
            "task": record.task,
            "label": record.label,
            "prediction": record.prediction,
            "scores": dict(zip(labels[record.task], record.scores, strict=True)),
        }
        for record in records
    ]
    tables = {
        task: per_label([record for record in records if record.task == task], known)
        for task, known in labels.items()
        if known
    }
    metrics = summarise(records, labels, said.roles)
    return {"n": len(records), **metrics, "per_label": tables, "predictions": predictions}


def load_trained(
    path: Path, config: ResolvedConfig, splits: Sequence[str]
) -> tuple[SpeechLLM, TrialData, dict[str, Any]]:
    """The model of a checkpoint, its data, and what else the checkpoint holds.

    Args:
        path: of the checkpoint.
        config: of its trial.
        splits: those that will be read.

    Raises:
        UserError: the checkpoint cannot be used, belongs to another configuration, or the corpus has changed.
    """
    state = checkpoint.load(path)
    model, data = build(config, "local", splits, available_device())
    if state["fingerprint"] != data.shards.fingerprint:
        raise UserError(
            f"{path}: trained on the corpus {state['fingerprint']}, and {data.shards.folder} is now "
            f"{data.shards.fingerprint}: their splits may differ; put the former shards back"
        )
    checkpoint.restore(model, state)
    return model, data, state


def find_checkpoint(source: Path) -> Path:
    """The checkpoint of a trial, or of a sweep's best one.

    Args:
        source: a sweep's folder, a trial's folder, or a checkpoint file beside its config.yaml.

    Raises:
        UserError: there is none, or none any more.
    """
    named = source.is_file() or source.name == checkpoint.FILE
    folder = source.parent if named else source
    if not (folder / "config.yaml").exists():
        raise UserError(f"{source}: neither a sweep, a trial nor a checkpoint beside its config.yaml; see runs/")
    if source.is_file() and source.name != "config.yaml":
        return source
    if (folder / checkpoint.FILE).exists():
        return folder / checkpoint.FILE
    if named or (folder / curve.FILE).exists():  # of a trial
        raise UserError(f"{source}: {_gone(folder)}")
    study = StudyStore.of(folder)
    best = study.best()
    if best is None:
        raise UserError(f"{folder}: no trial is complete yet; name a trial's folder, or finish the sweep")
    path = trial_folder(folder, best.number) / checkpoint.FILE
    if path.parent.exists() and not path.exists():
        raise UserError(f"{path}: {_gone(path.parent)}")
    return path


def _gone(folder: Path) -> str:
    """Why a trial has no checkpoint, and what to do."""
    if not (folder / "predictions.json").exists():  # written with the first epoch
        return "the trial has no checkpoint yet; train it first"
    return (
        "the trial has no checkpoint any more: a sweep keeps those of its best trials (storage.keep); name one of "
        f"them, or train this one again with `sweep train {folder / 'config.yaml'}`"
    )
