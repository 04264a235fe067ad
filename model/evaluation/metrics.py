"""Metrics of all tasks, from one record per item: they do not depend on how items were batched."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data.corpus.schema import JOIN, split_label

BINS = 15  # of the calibration error


@dataclass(frozen=True, slots=True)
class Record:
    """The prediction of one item."""

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

    def as_dict(self) -> dict[str, object]:
        """Return the fields, for JSON and tables."""
        return asdict(self)


def summarise(
    records: Sequence[Record], labels: Mapping[str, Sequence[str]], roles: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return the metrics of every task.

    Args:
        records: of all tasks.
        labels: by task, its labels in order; none for a task whose answer is text.
        roles: the labels of each role.

    Returns:
        Those of the first task by their names, those of the others as `<task>/<name>`. All tasks have `loss` (nats per
        token); see `label_metrics` and `text_metrics` for the others.
    """
    metrics: dict[str, float] = {}
    for index, (task, task_labels) in enumerate(labels.items()):
        of_task = [record for record in records if record.task == task]
        values = {"loss": sum(record.loss for record in of_task) / sum(record.tokens for record in of_task)}
        values |= label_metrics(of_task, task_labels, roles) if task_labels else text_metrics(of_task)
        metrics |= {name if index == 0 else f"{task}/{name}": value for name, value in values.items()}
    return metrics


def label_metrics(
    records: Sequence[Record], labels: Sequence[str], roles: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return accuracy and F1, overall, by role and by named subset, and the calibration error.

    F1 is over the declared label set, so a label that never occurs and is never predicted counts as 0 in the macro
    average, and a prediction outside a role's labels counts against that role. Where turns have several labels, F1 is
    over the single labels, and accuracy counts the turns whose set of labels is right.

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1` and `ece`; the first two also as `…_<role>` where a corpus has several
        roles; and `accuracy_<subset>`.
    """
    metrics = {"accuracy": _accuracy(records), **_f1(records, labels), "ece": calibration_error(records)}
    speakers = {record.speaker for record in records}
    present = [role for role in roles if role in speakers and not set(labels).isdisjoint(roles[role])]
    for role in present if len(present) > 1 else []:
        of_role = [record for record in records if record.speaker == role]
        metrics[f"accuracy_{role}"] = _accuracy(of_role)
        metrics[f"macro_f1_{role}"] = _f1(of_role, roles[role])["macro_f1"]
    for subset in sorted({record.subset for record in records if record.subset is not None}):
        metrics[f"accuracy_{subset}"] = _accuracy([record for record in records if record.subset == subset])
    return metrics


def text_metrics(records: Sequence[Record]) -> dict[str, float]:
    """Compare generated texts with the true ones.

    Returns:
        `perplexity` of the true texts, corpus `bleu` (Papineni et al., 2002; 0 to 100), mean `rouge_l` (F-measure; Lin,
        2004), and how decoding ended, as shares: `eos_rate`, `run_on` (cut at the limit) and `empty`.
    """
    import sacrebleu

    predicted, true = [record.prediction for record in records], [record.label for record in records]
    ended = sum(record.ended for record in records) / len(records)
    return {
        "perplexity": math.exp(min(700.0, sum(r.loss for r in records) / sum(r.tokens for r in records))),
        "bleu": float(sacrebleu.corpus_bleu(predicted, [true]).score),
        "rouge_l": float(np.mean(rouge_l(records))),
        "eos_rate": ended,
        "run_on": 1 - ended,
        "empty": sum(not text for text in predicted) / len(predicted),
    }


def rouge_l(records: Sequence[Record]) -> list[float]:
    """Return ROUGE-L (F-measure; Lin, 2004) of each text."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(record.label, record.prediction)["rougeL"].fmeasure for record in records]


def calibration_error(records: Sequence[Record]) -> float:
    """Return the expected calibration error with bins of equal width (Guo et al., 2017, arXiv 1706.04599, equation 3).

    The confidence is the predicted label's probability among the labels.
    """
    scores_IK = np.array([record.scores for record in records])
    shares_IK = np.exp(scores_IK - scores_IK.max(1, keepdims=True))
    confidence = shares_IK.max(1) / shares_IK.sum(1)
    right = np.array([record.label == record.prediction for record in records], dtype=float)
    # Bins are open to the left, as in the paper.
    bins = np.ceil(confidence * BINS).astype(int).clip(1, BINS) - 1
    gaps = np.bincount(bins, right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(records))


def per_label(records: Sequence[Record], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and support of each single label."""
    single = single_labels(labels)
    right_L, predicted_L, true_L = _counts(records, single)
    columns = {
        "precision": _ratio(right_L, predicted_L),
        "recall": _ratio(right_L, true_L),
        "f1": _ratio(2.0 * right_L, true_L + predicted_L),
        "support": true_L,
    }
    return {
        label: {name: float(column[index]) for name, column in columns.items()} for index, label in enumerate(single)
    }


def confusion(records: Sequence[Record], labels: Sequence[str]) -> np.ndarray:
    """Return the counts [true label, predicted label]; an item with another label on either side is left out."""
    position = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for true, predicted in zip(*_pairs(records), strict=True):
        if true in position and predicted in position:
            counts[position[true], position[predicted]] += 1
    return counts


def _pairs(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    return [record.label for record in records], [record.prediction for record in records]


def single_labels(labels: Sequence[str]) -> list[str]:
    """Return the labels without those that combine several labels of a turn."""
    return [label for label in labels if JOIN not in label]


def indicators(records: Sequence[Record], single: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return bool [item, label] twice: whether the turn has the label, and whether it is predicted.

    Labels other than `single` are wrong answers, and belong to no class.
    """
    sides = [[set(split_label(text)) for text in side] for side in _pairs(records)]
    true_IL, predicted_IL = (
        np.array([[label in found for label in single] for found in side], bool).reshape(-1, len(single))
        for side in sides
    )
    return true_IL, predicted_IL


def _accuracy(records: Sequence[Record]) -> float:
    return float(np.mean([record.label == record.prediction for record in records]))


def _f1(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    right_L, predicted_L, true_L = _counts(records, single_labels(labels))
    f1_L = _ratio(2.0 * right_L, true_L + predicted_L)
    weighted = np.average(f1_L, weights=true_L) if true_L.any() else f1_L.mean()
    return {"macro_f1": float(f1_L.mean()), "weighted_f1": float(weighted)}


def _counts(records: Sequence[Record], single: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, by label, how often it is predicted rightly, how often it is predicted, and how often it is true."""
    true_IL, predicted_IL = indicators(records, single)
    return (true_IL & predicted_IL).sum(0), predicted_IL.sum(0), true_IL.sum(0)


def _ratio(part_L: np.ndarray, whole_L: np.ndarray) -> np.ndarray:
    """Return part / whole, and 0 where the whole is 0, as scikit-learn does with `zero_division=0`, to the bit."""
    ratio_L: np.ndarray = np.where(whole_L == 0, 0.0, part_L / np.maximum(whole_L, 1))
    return ratio_L
