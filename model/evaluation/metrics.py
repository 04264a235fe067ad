"""Metrics of all tasks, from one record an item: nothing here depends on how items were batched."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.corpus.schema import JOIN, split_label

BINS = 15  # of the confidence, for the calibration error


@dataclass(frozen=True, slots=True)
class Record:
    """What the model said about one item."""

    id: str
    task: str
    conversation: str
    speaker: str
    subset: str | None
    label: str  # the true answer: a label, or a text
    prediction: str
    scores: tuple[float, ...]  # log-probability of each label, in the order of the task's labels; empty for texts
    loss: float  # nats over the tokens of the true answer
    tokens: int  # of the true answer, EOS included
    ended: bool = True  # a generated text ended by EOS

    def as_dict(self) -> dict[str, Any]:
        """For JSON and tables."""
        return asdict(self)


def summarise(
    records: Sequence[Record], labels: Mapping[str, Sequence[str]], roles: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """The metrics of every task.

    Args:
        records: of all tasks.
        labels: by task, its labels in order; none for a task whose answer is text.
        roles: who may carry which label.

    Returns:
        Those of the first task by their names, those of the others as `<task>/<name>`. All tasks have `loss` (nats a
        token); see `label_metrics` and `text_metrics` for the others.
    """
    found: dict[str, float] = {}
    for place, (task, known) in enumerate(labels.items()):
        own = [record for record in records if record.task == task]
        values = {"loss": sum(record.loss for record in own) / sum(record.tokens for record in own)}
        values |= label_metrics(own, known, roles) if known else text_metrics(own)
        found |= {name if place == 0 else f"{task}/{name}": value for name, value in values.items()}
    return found


def label_metrics(
    records: Sequence[Record], labels: Sequence[str], roles: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Accuracy, macro- and weighted F1, overall, by role and by named subset, and the calibration error.

    F1 is over the declared label set, so a label that never occurs and is never predicted counts as 0 in the macro
    average, and a prediction outside a role's labels counts against that role. Where turns have several labels, F1 is
    over the single ones and accuracy asks for the whole set.

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1`, then the first two as `…_<role>` where a corpus has several roles,
        `accuracy_<subset>`, and `ece`.
    """
    found = {"accuracy": _accuracy(records), **_f1(records, labels), "ece": calibration_error(records)}
    speakers = {record.speaker for record in records}
    present = [role for role in roles if role in speakers and not set(labels).isdisjoint(roles[role])]
    for role in present if len(present) > 1 else []:
        own = [record for record in records if record.speaker == role]
        found[f"accuracy_{role}"] = _accuracy(own)
        found[f"macro_f1_{role}"] = _f1(own, roles[role])["macro_f1"]
    for subset in sorted({record.subset for record in records if record.subset is not None}):
        found[f"accuracy_{subset}"] = _accuracy([record for record in records if record.subset == subset])
    return found


def text_metrics(records: Sequence[Record]) -> dict[str, float]:
    """Of generated texts against the true ones.

    Returns:
        `perplexity` of the true texts, corpus `bleu` (Papineni et al., 2002; 0 to 100), mean `rouge_l` (F-measure; Lin,
        2004), and the health of decoding: the shares `eos_rate`, `run_on` (cut at the limit) and `empty`.
    """
    import sacrebleu

    said, truth = [record.prediction for record in records], [record.label for record in records]
    ended = sum(record.ended for record in records) / len(records)
    return {
        "perplexity": math.exp(min(700.0, sum(r.loss for r in records) / sum(r.tokens for r in records))),
        "bleu": float(sacrebleu.corpus_bleu(said, [truth]).score),
        "rouge_l": float(np.mean(rouge_l(records))),
        "eos_rate": ended,
        "run_on": 1 - ended,
        "empty": sum(not text for text in said) / len(said),
    }


def rouge_l(records: Sequence[Record]) -> list[float]:
    """ROUGE-L of each text (F-measure)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(record.label, record.prediction)["rougeL"].fmeasure for record in records]


def calibration_error(records: Sequence[Record]) -> float:
    """Expected calibration error with bins of equal width (Guo et al., 2017, arXiv 1706.04599, equation 3).

    The confidence is the predicted label's probability among the labels.
    """
    scores = np.array([record.scores for record in records])
    shares = np.exp(scores - scores.max(1, keepdims=True))
    confidence = shares.max(1) / shares.sum(1)
    right = np.array([record.label == record.prediction for record in records], dtype=float)
    # Bins are open to the left, as in the paper.
    bins = np.ceil(confidence * BINS).astype(int).clip(1, BINS) - 1
    gaps = np.bincount(bins, right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(records))


def per_label(records: Sequence[Record], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each single label."""
    from sklearn.metrics import precision_recall_fscore_support

    single = single_labels(labels)
    truth, said = indicators(records, single)
    columns = precision_recall_fscore_support(truth, said, labels=range(len(single)), average=None, zero_division=0)
    names = ("precision", "recall", "f1", "support")
    return {
        label: {name: float(column[place]) for name, column in zip(names, columns, strict=True)}
        for place, label in enumerate(single)
    }


def confusion(records: Sequence[Record], labels: Sequence[str]) -> np.ndarray:
    """Counts [true label, predicted label]."""
    from sklearn.metrics import confusion_matrix

    counts: np.ndarray = confusion_matrix(*_pairs(records), labels=list(labels))
    return counts


def _pairs(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    return [record.label for record in records], [record.prediction for record in records]


def single_labels(labels: Sequence[str]) -> list[str]:
    """Without those that stand for several labels of a turn."""
    return [label for label in labels if JOIN not in label]


def indicators(records: Sequence[Record], single: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[item, label]: whether the turn has the label, and whether the model said so. Labels beyond `single` are wrong
    answers and nobody's class."""
    from sklearn.preprocessing import MultiLabelBinarizer

    # A column that is always empty: scikit-learn takes a matrix of one column for another kind of problem.
    binarizer = MultiLabelBinarizer(classes=[*single, JOIN])
    known = set(single)
    columns = [[known & set(split_label(text)) for text in side] for side in _pairs(records)]
    truth, said = (binarizer.fit_transform(column) for column in columns)
    return truth, said


def _accuracy(records: Sequence[Record]) -> float:
    return float(np.mean([record.label == record.prediction for record in records]))


def _f1(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    single = single_labels(labels)
    truth, said = indicators(records, single)
    own = {"labels": range(len(single)), "zero_division": 0}
    return {
        f"{average}_f1": float(precision_recall_fscore_support(truth, said, average=average, **own)[2])
        for average in ("macro", "weighted")
    }
