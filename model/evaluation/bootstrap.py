"""How sure a metric is, and whether one model is better than another: whole sessions are resampled, since what is said
in one is not independent, and so are the seeds of repeated trainings.

Legend: I items, G sessions, S trainings with different seeds, R resamples, N numbers that a metric is made of.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.formats import format_interval
from model.evaluation.metrics import Record, indicators, rouge_l, single_labels

RESAMPLES, LEVEL = 2000, 0.95
Records = Sequence[Record]


@dataclass(frozen=True)
class Interval:
    """A number and the limits within which it lies with 95 %; None where nothing can be resampled."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return format_interval(self.value, self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same items."""

    difference: Interval  # of the first minus the second, in the metric's own units
    better: bool | None  # whether the first one is; None: tied within noise
    mcnemar: float | None  # p of McNemar's exact test on the labels; None where answers are texts

    def told(self, one: str, other: str) -> str:
        """In words, by their names."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return f"{one} and {other} cannot be told apart: there are not two sessions"
        if self.better is None:
            return f"{one} and {other}: tied within noise ({self.difference.value:+.3f} [{low:+.3f}, {high:+.3f}])"
        first, second = (one, other) if self.better else (other, one)
        near, far = sorted((abs(low), abs(high)))
        return f"{first} beats {second} by {abs(self.difference.value):.3f} [{near:.3f}, {far:.3f}]"


@dataclass(frozen=True)
class Sums:
    """A metric that is made of sums over items."""

    of: Callable[[Records], np.ndarray]  # [I, N], what each item adds
    value: Callable[[np.ndarray], np.ndarray]  # [..., N] → [...]
    is_share: bool = False  # N are two: how many items are right, and how many there are


def sums_of(name: str, labels: Sequence[str], roles: Mapping[str, Sequence[str]]) -> Sums | None:
    """A metric by its name in `summarise`, without the task; None for one that has none.

    The calibration error is one of them, although it is made of sums: what resampling adds to the gap of a bin never
    cancels out, so its percentiles would lie above the value.

    Args:
        name: of the metric.
        labels: of the task; none where answers are texts.
        roles: who may carry which label.
    """
    if name in ("loss", "perplexity"):
        return Sums(_losses, _ratio if name == "loss" else _perplexity)
    if name in TEXTS and not labels:
        return TEXTS[name]
    kind = next((kind for kind in ("macro_f1", "weighted_f1", "accuracy") if name.startswith(kind)), None)
    if kind is None or not labels:
        return None
    part = name.removeprefix(kind).removeprefix("_")  # a role, or a named subset
    known = single_labels(roles.get(part, labels))

    def own(sums_IN: np.ndarray, records: Records) -> np.ndarray:
        counts: list[bool] = [not part or part in (record.speaker, record.subset) for record in records]
        kept: np.ndarray = sums_IN * np.array(counts)[:, None]
        return kept

    if kind == "accuracy":
        return Sums(lambda records: own(_right(records), records), _ratio, is_share=True)
    average = _macro if kind == "macro_f1" else _weighted
    return Sums(lambda records: own(_counts(records, known), records), average)


def _losses(records: Records) -> np.ndarray:
    return np.array([(record.loss, record.tokens) for record in records], dtype=float)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return _share(sums[..., 0], sums[..., 1])


def _perplexity(sums: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(np.minimum(700.0, _ratio(sums)))
    return found


def _right(records: Records) -> np.ndarray:
    return np.array([(record.label == record.prediction, 1) for record in records], dtype=float)


def _counts(records: Records, labels: Sequence[str]) -> np.ndarray:
    """[I, 3 * labels]: true positives, what was said, and what is true."""
    truth, said = (side[:, : len(labels)].astype(float) for side in indicators(records, labels))
    return np.concatenate([truth * said, said, truth], axis=1)


def _ngrams(records: Records) -> np.ndarray:
    """[I, 2 + 2 * 4]: what sacrebleu sums of a corpus: lengths, n-grams that match, and all of them."""
    from sacrebleu.metrics.bleu import BLEU

    said, truth = [record.prediction for record in records], [record.label for record in records]
    return np.array(BLEU()._extract_corpus_statistics(said, [truth]), dtype=float)


def _bleu(sums: np.ndarray) -> np.ndarray:
    from sacrebleu.metrics.bleu import BLEU

    score = BLEU()._compute_score_from_stats
    return np.apply_along_axis(lambda own: score(own.astype(int).tolist()).score, -1, sums)


def _overlaps(records: Records) -> np.ndarray:
    return np.array([(overlap, 1) for overlap in rouge_l(records)], dtype=float)


TEXTS = {"bleu": Sums(_ngrams, _bleu), "rouge_l": Sums(_overlaps, _ratio)}


def _by_label(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 and support of each label; F1 is 0 where a label neither occurs nor is said, as in `label_metrics`."""
    hit, said, true = np.split(sums, 3, axis=-1)
    return _share(2 * hit, said + true), true


def _macro(sums: np.ndarray) -> np.ndarray:
    average: np.ndarray = _by_label(sums)[0].mean(-1)
    return average


def _weighted(sums: np.ndarray) -> np.ndarray:
    f1, support = _by_label(sums)
    return _share((f1 * support).sum(-1), support.sum(-1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)
    return shares


def interval(runs: Sequence[Records], sums: Sums) -> Interval:
    """The mean of a metric over trainings, with its 95 % percentile interval.

    Where every prediction is right, or none is, resampling gives no width, and the exact binomial interval (Clopper and
    Pearson, 1934) stands in; a metric other than accuracy then has none.

    Args:
        runs: the predictions of each training, on the same items.
        sums: the metric.
    """
    sessions = _sessions(runs)
    table_SGN = _table(runs, sessions, sums)
    value = float(sums.value(table_SGN.sum(1)).mean())
    low, high = _limits(len(sessions), [len(runs)], lambda chosen, seeds: _mean(sums, table_SGN, chosen, seeds[0]))
    if low is not None and low == high:
        low, high = _exact(table_SGN[0].sum(0)) if sums.is_share else (None, None)
    return Interval(value, low, high)


def _exact(counts: np.ndarray) -> tuple[float, float]:
    from scipy.stats import binomtest

    found = binomtest(int(counts[0]), int(counts[1])).proportion_ci()
    return float(found.low), float(found.high)


def compare(ones: Sequence[Records], others: Sequence[Records], sums: Sums, maximize: bool) -> Comparison:
    """Two models on the same items, each trained one or several times.

    The interval is that of the difference, with the same sessions drawn for both (a paired bootstrap) and seeds drawn
    for each. McNemar's test (Psychometrika 12, 1947; here its exact form) takes the label that most trainings of a
    model give an item; it knows nothing of sessions, so the interval decides.

    Args:
        ones: the predictions of each training of the first model.
        others: those of the second.
        sums: the metric.
        maximize: whether more of it is better.

    Raises:
        ValueError: they predict different items.
    """
    if {_key(record) for record in ones[0]} != {_key(record) for record in others[0]}:
        raise ValueError("predictions of different items cannot be compared")
    sessions = _sessions(ones)
    one, other = (_table(runs, sessions, sums) for runs in (ones, others))
    value = float(sums.value(one.sum(1)).mean() - sums.value(other.sum(1)).mean())

    def difference(chosen: np.ndarray, seeds: Sequence[np.ndarray | None]) -> np.ndarray:
        apart: np.ndarray = _mean(sums, one, chosen, seeds[0]) - _mean(sums, other, chosen, seeds[1])
        return apart

    low, high = _limits(len(sessions), [len(ones), len(others)], difference)
    clear = low is not None and high is not None and low * high > 0
    better = (value > 0) == maximize if clear else None
    return Comparison(Interval(value, low, high), better, _mcnemar(vote(ones), vote(others)))


def vote(runs: Sequence[Records]) -> dict[tuple[str, str], Record]:
    """By item, a record with the prediction that most trainings gave; of equals the first one."""
    found = {}
    for record in runs[0]:
        found[_key(record)] = [record]
    for run in runs[1:]:
        for record in run:
            found[_key(record)].append(record)
    chosen = {}
    for key, own in found.items():
        most = Counter(record.prediction for record in own).most_common(1)[0][0]
        chosen[key] = next(record for record in own if record.prediction == most)
    return chosen


def _mcnemar(one: Mapping[tuple[str, str], Record], other: Mapping[tuple[str, str], Record]) -> float | None:
    from scipy.stats import binomtest

    if not all(record.scores for record in one.values()):
        return None
    right = [(one[key].label == one[key].prediction, other[key].label == other[key].prediction) for key in one]
    only = (right.count((True, False)), right.count((False, True)))
    return float(binomtest(only[0], sum(only)).pvalue) if any(only) else 1.0


def _key(record: Record) -> tuple[str, str]:
    return record.task, record.id


def _sessions(runs: Sequence[Records]) -> list[str]:
    return sorted({record.conversation for record in runs[0]})


def _table(runs: Sequence[Records], sessions: Sequence[str], sums: Sums) -> np.ndarray:
    """[S, G, N]."""
    place, rows = {session: place for place, session in enumerate(sessions)}, []
    for run in runs:
        added_IN = sums.of(run)
        table_GN = np.zeros((len(sessions), added_IN.shape[1]))
        np.add.at(table_GN, [place[record.conversation] for record in run], added_IN)
        rows.append(table_GN)
    return np.array(rows)


def _mean(sums: Sums, table_SGN: np.ndarray, chosen_RG: np.ndarray, seeds_RS: np.ndarray | None) -> np.ndarray:
    """[R]: the metric over the chosen sessions, averaged over the chosen trainings."""
    values_RS = np.stack([sums.value(table_GN[chosen_RG].sum(-2)) for table_GN in table_SGN], axis=-1)
    if seeds_RS is not None:
        values_RS = np.take_along_axis(values_RS, np.broadcast_to(seeds_RS, values_RS.shape), axis=-1)
    mean: np.ndarray = values_RS.mean(-1)
    return mean


def _limits(
    sessions: int, trainings: Sequence[int], statistic: Callable[[np.ndarray, Sequence[np.ndarray | None]], np.ndarray]
) -> tuple[float | None, float | None]:
    """Percentile limits of a statistic of sessions and, where there are several, of the seeds of each model.

    Drawing both at once counts what is neither a session's nor a seed's twice more, so it errs on the careful side
    (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007). Expanded as by Hesterberg ("What Teachers
    Should Know About the Bootstrap", The American Statistician 69, 2015, section 5.2): resampling few sessions makes
    intervals too narrow, by what a t-distribution is wider than a normal one.
    """
    from scipy.stats import bootstrap, norm, t

    if sessions < 2:
        return None, None
    several = [count > 1 for count in trainings]

    def drawn(*samples: np.ndarray, axis: int) -> np.ndarray:
        seeds = iter(samples[1:])
        return statistic(samples[0], [next(seeds) if many else None for many in several])

    ranges = [np.arange(sessions), *(np.arange(count) for count in trainings if count > 1)]
    level = 1 - 2 * norm.sf(math.sqrt(sessions / (sessions - 1)) * t.ppf((1 + LEVEL) / 2, sessions - 1))
    found = bootstrap(
        ranges,
        drawn,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
