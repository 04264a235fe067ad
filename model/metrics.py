"""Metrics of label tasks, from one record per utterance: nothing here depends on how utterances were batched."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Record:
    """What the model said about one utterance."""

    id: str
    conversation: str
    speaker: str
    subset: str | None
    label: str
    prediction: str
    scores: tuple[float, ...]  # log-probability of each label, in the order of the label set

    def as_dict(self) -> dict[str, Any]:
        """For JSON and tables."""
        return asdict(self)


def summarise(records: Sequence[Record], labels: Sequence[str], roles: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Accuracy, macro- and weighted F1, overall, by role and by named subset.

    F1 is over the declared label set, so a label that never occurs and is never predicted counts as 0 in the macro
    average, and a prediction outside a role's labels counts against that role.

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1`, then the first two as `…_<role>` where a corpus has several roles, and
        `accuracy_<subset>`.
    """
    found = {"accuracy": _accuracy(records), **_f1(records, labels)}
    present = [role for role in roles if any(record.speaker == role for record in records)]
    for role in present if len(present) > 1 else []:
        own = [record for record in records if record.speaker == role]
        found[f"accuracy_{role}"] = _accuracy(own)
        found[f"macro_f1_{role}"] = _f1(own, roles[role])["macro_f1"]
    for subset in sorted({record.subset for record in records if record.subset is not None}):
        found[f"accuracy_{subset}"] = _accuracy([record for record in records if record.subset == subset])
    return found


def per_label(records: Sequence[Record], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each label."""
    truth, said = _pairs(records)
    columns = precision_recall_fscore_support(truth, said, labels=list(labels), average=None, zero_division=0)
    names = ("precision", "recall", "f1", "support")
    return {
        label: {name: float(column[place]) for name, column in zip(names, columns, strict=True)}
        for place, label in enumerate(labels)
    }


def confusion(records: Sequence[Record], labels: Sequence[str]) -> np.ndarray:
    """Counts [true label, predicted label]."""
    counts: np.ndarray = confusion_matrix(*_pairs(records), labels=list(labels))
    return counts


def accuracy_interval(records: Sequence[Record], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the accuracy, bootstrapped by conversation: utterances of one are not independent.

    Where every prediction is right, or none is, resampling gives no width, and the exact binomial interval (Clopper and
    Pearson, 1934) stands in. With a single conversation nothing can be resampled: the interval is the widest possible.
    """
    from scipy.stats import binomtest, bootstrap

    sessions = sorted({record.conversation for record in records})
    if len(sessions) < 2:
        return 0.0, 1.0
    place = {session: number for number, session in enumerate(sessions)}
    right, total = np.zeros(len(sessions)), np.zeros(len(sessions))
    for record in records:
        right[place[record.conversation]] += record.label == record.prediction
        total[place[record.conversation]] += 1

    if right.sum() in (0, len(records)):
        exact = binomtest(int(right.sum()), len(records)).proportion_ci()
        return float(exact.low), float(exact.high)

    def accuracy(chosen: np.ndarray, axis: int) -> np.ndarray:
        share: np.ndarray = right[chosen].sum(axis) / total[chosen].sum(axis)
        return share

    result = bootstrap(
        (np.arange(len(sessions)),),
        accuracy,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _pairs(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    return [record.label for record in records], [record.prediction for record in records]


def _accuracy(records: Sequence[Record]) -> float:
    return float(accuracy_score(*_pairs(records)))


def _f1(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    truth, said = _pairs(records)
    means = {}
    for average in ("macro", "weighted"):
        means[f"{average}_f1"] = float(
            precision_recall_fscore_support(truth, said, labels=list(labels), average=average, zero_division=0)[2]
        )
    return means
