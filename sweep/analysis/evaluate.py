"""`sweep evaluate`: evaluate a checkpoint on a split, in this process, from the shards on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.corpus.schema import SPLITS
from data.errors import UserError
from data.formats import format_number
from model.checkpoints import checkpoint
from model.checkpoints.fingerprint import Bases, identify_bases, refuse_other_bases
from model.evaluation.bootstrap import Interval
from model.evaluation.ceiling import Ceiling, ceilings
from model.evaluation.evaluator import evaluate
from model.evaluation.metrics import Record, per_label, summarise
from model.evaluation.split_data import TrialData
from model.speech_llm.speech_llm import SpeechLLM
from model.training import metrics_log
from sweep.analysis.predictions import interval_of
from sweep.analysis.view import Column, TableView
from sweep.config.files import load
from sweep.config.paths import shell_command, trial_folder
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.execution.trial import available_device, build
from sweep.search.study import StudyStore


@dataclass(frozen=True)
class SplitPredictions:
    """The predictions of a model on a split."""

    records: list[Record]
    labels: dict[str, tuple[str, ...]]  # by task
    roles: Mapping[str, Sequence[str]]  # the labels that each role may carry
    codes: Mapping[str, str] = field(default_factory=dict)  # of a turn by id, if `data.codes` merges them into labels
    ceilings: Sequence[Ceiling] = ()  # of the tasks whose items have several annotators


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model on a split, and how good they are."""

    split: str
    predictions: SplitPredictions
    metrics: dict[str, float]  # by name as in `summarise`
    per_label: dict[str, dict[str, dict[str, float]]]  # by task and label: precision, recall, f1, support
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # 95 % by session, of the metrics that have one

    @property
    def per_code(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return, by task and code of the codebook, how often each label was predicted; empty without a level."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for record in self.predictions.records:
            if (code := self.predictions.codes.get(record.id)) and self.predictions.labels[record.task]:
                row = counts.setdefault(record.task, {}).setdefault(code, {})
                row[record.prediction] = row.get(record.prediction, 0) + 1
        return {task: dict(sorted(rows.items())) for task, rows in counts.items()}

    def to_json(self) -> dict[str, object]:
        """Return `n`, metrics and their `intervals`, `per_label`, and `predictions` with every label's log-probability.

        With `data.codes` also `per_code`, and the `code` of every prediction as the corpus stores it. With several
        annotators also `human_ceiling` by task: their figures, and the model's on the same turns.
        """
        labels, codes = self.predictions.labels, self.predictions.codes
        predictions = [
            {
                "id": record.id,
                "task": record.task,
                **({"code": codes[record.id]} if record.id in codes else {}),
                "label": record.label,
                "prediction": record.prediction,
                "scores": dict(zip(labels[record.task], record.scores, strict=True)),
            }
            for record in self.predictions.records
        ]
        per_code = {"per_code": self.per_code} if codes else {}
        ceilings = {one.task: one.to_json(self.predictions.records) for one in self.predictions.ceilings}
        human = {"human_ceiling": ceilings} if ceilings else {}
        tables = {"per_label": self.per_label, **per_code, **human, "predictions": predictions}
        intervals = {name: [interval.low, interval.high] for name, interval in self.intervals.items()}
        return {"n": len(predictions), **self.metrics, "intervals": intervals, **tables}

    def tables(self) -> list[TableView]:
        """Return the figures of each label, a table for every task that has labels."""
        names = ("precision", "recall", "f1")
        columns = [Column("label", is_text=True), *map(Column, (*names, "support"))]
        return [
            TableView(
                columns,
                [
                    [label, *(format_number(row[name]) for name in names), f"{row['support']:.0f}"]
                    for label, row in rows.items()
                ],
                title=f"{task}: {self.split} split",
            )
            for task, rows in self.per_label.items()
        ]

    def code_tables(self) -> list[TableView]:
        """Return, for every task, what was predicted for each code of the codebook; none without a level."""
        right: dict[tuple[str, str], int] = {}
        true: dict[tuple[str, str], str] = {}
        for record in self.predictions.records:
            key = record.task, self.predictions.codes.get(record.id, "")
            true.setdefault(key, record.label)
            right[key] = right.get(key, 0) + (record.label == record.prediction)
        columns = [Column(name, is_text=True) for name in ("code", "label")]
        return [
            TableView(
                [*columns, Column("turns"), Column("right"), Column("predicted", is_text=True)],
                [
                    [code, true[task, code], str(sum(row.values())), str(right[task, code]), _ranked(row)]
                    for code, row in rows.items()
                ],
                title=f"{task}: codes of the {self.split} split",
            )
            for task, rows in self.per_code.items()
        ]

    def line(self) -> str:
        """Return all metrics in a line, with their intervals."""
        shown = (f"{name} {self.intervals.get(name) or format_number(value)}" for name, value in self.metrics.items())
        return "  ".join(shown) + (" (in brackets 95 % by session)" if self.intervals else "")

    def ceiling_lines(self) -> list[str]:
        """Return how well annotators predict each other, and the model's figures on the same turns."""
        records = self.predictions.records
        return [line for ceiling in self.predictions.ceilings for line in ceiling.lines(records)]


def _ranked(counts: Mapping[str, int]) -> str:
    """Return labels with their counts, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{label} {count}" for label, count in ranked)


@dataclass(frozen=True)
class TrainedModel:
    """The model of a checkpoint with its data."""

    model: SpeechLLM
    data: TrialData
    fingerprint: str  # of the corpus
    epoch: int  # of its weights; 0: the first one is not complete
    metrics: Mapping[str, object]  # of that evaluation, on the validation split
    bases: Bases  # the models that it was trained on, by setting
    bases_are_recorded: bool  # by its training; otherwise `bases` are those that are there now


def predict(
    source: Path,
    split: str,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
    allow_other_base: bool = False,
) -> SplitPredictions:
    """Predict a split.

    Args:
        source: a sweep's folder (its best trial), a trial's folder, or a checkpoint file beside its config.yaml.
        split: train, val or test.
        batch_size: items computed at once; None: as many as `train.token_budget` allows.
        overrides: settings of the data as key=value, for controls: the same model with other audio or less history.
        allow_other_base: accept a checkpoint that was trained on other base models.

    Raises:
        UserError: the checkpoint or the split does not exist, the corpus or a base model has changed, or a setting
            outside `data` is overridden.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split}: unknown; use one of {', '.join(SPLITS)}")
    path = find_checkpoint(source)
    for override in overrides:
        if not override.startswith(("data.", "train.token_budget=")):
            raise UserError(f"--set {override}: only data.* can be changed for a trained model")
    config = resolve(load(str(path.with_name("config.yaml")), overrides))
    trained = load_trained(path, config, (split,), allow_other_base)
    records = evaluate(trained.model, trained.data, split, config.train.initial_token_budget, batch_size)
    labels = {task: tuple(answers.labels) for task, answers in trained.model.tasks.items()}
    shards = trained.data.shards
    codes = {} if shards.merge is None else shards.stored_codes
    found = ceilings(shards, list(labels), (split,))
    return SplitPredictions(records, labels, shards.manifest.roles, codes, found)


def evaluate_checkpoint(
    source: Path,
    split: str,
    batch_size: int | None,
    overrides: Sequence[str] = (),
    allow_other_base: bool = False,
) -> Evaluation:
    """Predict a split and compute its metrics; see `predict` for arguments and errors."""
    predictions = predict(source, split, batch_size, overrides, allow_other_base)
    by_task = {
        task: (list(labels), [record for record in predictions.records if record.task == task])
        for task, labels in predictions.labels.items()
    }
    tables = {task: per_label(records, labels) for task, (labels, records) in by_task.items() if labels}
    metrics = summarise(predictions.records, predictions.labels, predictions.roles)
    found = {name: interval_of(by_task, name, predictions.roles) for name in metrics}
    intervals = {name: interval for name, interval in found.items() if interval and interval.low is not None}
    return Evaluation(split, predictions, metrics, tables, intervals)


def load_trained(
    path: Path, config: ResolvedConfig, splits: Sequence[str], allow_other_base: bool = False
) -> TrainedModel:
    """Load the model of a checkpoint with its data.

    Args:
        path: of the checkpoint.
        config: of its trial.
        splits: those that will be read.
        allow_other_base: accept a checkpoint that was trained on other base models.

    Raises:
        UserError: the checkpoint cannot be used, belongs to another configuration, or the corpus or a base model has
            changed.
    """
    state = checkpoint.load_result(path)
    if not allow_other_base:  # before weights are loaded
        refuse_other_bases(str(path), checkpoint.bases_of(state), identify_bases(config.model))
    model, data = build(config, "local", splits, available_device(), allow_other_base=allow_other_base)
    if state["fingerprint"] != data.shards.fingerprint:
        raise UserError(
            f"{path}: trained on the corpus {state['fingerprint']}, and {data.shards.folder} is now "
            f"{data.shards.fingerprint}, so their splits may differ; restore the former shards"
        )
    checkpoint.restore(model, state, str(path))
    epoch = checkpoint.result_epoch(state)
    metrics = dict(state["progress"]["history"]).get(epoch, {})
    bases = checkpoint.bases_of(state)
    return TrainedModel(model, data, state["fingerprint"], epoch, metrics, bases or model.bases, bool(bases))


def find_checkpoint(source: Path) -> Path:
    """Return the checkpoint of a trial, or of a sweep's best trial.

    Args:
        source: a sweep's folder, a trial's folder, or a checkpoint file beside its config.yaml.

    Raises:
        UserError: there is no checkpoint, or the sweep has deleted it.
    """
    named = source.is_file() or source.name == checkpoint.FILE
    folder = source.parent if named else source
    if not (folder / "config.yaml").exists():
        raise UserError(f"{source}: neither a sweep, a trial nor a checkpoint beside its config.yaml; see runs/")
    if source.is_file() and source.name != "config.yaml":
        return source
    if (folder / checkpoint.FILE).exists():
        return folder / checkpoint.FILE
    if named or (folder / metrics_log.FILE).exists():  # of a trial
        raise UserError(f"{source}: {_why_missing(folder)}")
    study = StudyStore.of(folder)
    best = study.best()
    if best is None:
        raise UserError(f"{folder}: no trial is complete yet; name a trial's folder, or finish the sweep")
    path = trial_folder(folder, best.number) / checkpoint.FILE
    if path.parent.exists() and not path.exists():
        raise UserError(f"{path}: {_why_missing(path.parent)}")
    return path


def _why_missing(folder: Path) -> str:
    """Return why a trial has no checkpoint, and what to do."""
    if not (folder / "predictions.json").exists():  # written with the first epoch
        return "the trial has no checkpoint yet; train it first"
    return (
        "the trial has no checkpoint any more: a sweep keeps those of its best trials (storage.keep); name one of "
        f"them, or train this trial again with `{shell_command('sweep', 'train', folder / 'config.yaml')}`"
    )
