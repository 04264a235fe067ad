"""Confidence intervals of metrics, and comparisons of models, by resampling.

Whole sessions are resampled, since turns of one session are not independent, and so are the seeds of repeated
trainings.

Shapes: I items, G sessions, S trainings with different seeds, R resamples, N sums that a metric is made of, L labels.
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
ItemKey = tuple[str, str]  # task, id


@dataclass(frozen=True)
class Interval:
    """A value and the limits of its 95 % interval; None where nothing can be resampled."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return format_interval(self.value, self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same items."""

    difference: Interval  # of the first minus the second, in the metric's units
    better: bool | None  # whether the first is better; None: tied within noise
    mcnemar: float | None  # p of McNemar's exact test on the labels; None where answers are texts

    def describe(self, first: str, second: str) -> str:
        """Return the result in a sentence, given the names of the models."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return f"{first} and {second} cannot be compared: there are fewer than two sessions"
        if low == high == 0:
            return f"{first} and {second} have the same result in every session"
        if self.better is None:
            return f"{first} and {second}: tied within noise ({self.difference.value:+.3f} [{low:+.3f}, {high:+.3f}])"
        winner, loser = (first, second) if self.better else (second, first)
        near, far = sorted((abs(low), abs(high)))
        return f"{winner} beats {loser} by {abs(self.difference.value):.3f} [{near:.3f}, {far:.3f}]"


@dataclass(frozen=True)
class SummedMetric:
    """A metric that is a function of sums over items."""

    item_sums: Callable[[Records], np.ndarray]  # → [I, N], what each item adds
    value: Callable[[np.ndarray], np.ndarray]  # [..., N] → [...]
    is_share: bool = False  # N are two: how many items are right, and how many there are


def summed_metric(name: str, labels: Sequence[str], roles: Mapping[str, Sequence[str]]) -> SummedMetric | None:
    """Return a metric of `summarise` as a function of sums, or None if it cannot be resampled.

    The calibration error cannot: what resampling adds to the gap of a bin never cancels out, so its percentiles would
    be above the value.

    Args:
        name: of the metric, without the task.
        labels: of the task; none where answers are texts.
        roles: the labels of each role.
    """
    if name in ("loss", "perplexity"):
        return SummedMetric(_losses, _ratio if name == "loss" else _perplexity)
    if name in TEXT_METRICS and not labels:
        return TEXT_METRICS[name]
    kind = next((kind for kind in ("macro_f1", "weighted_f1", "accuracy") if name.startswith(kind)), None)
    if kind is None or not labels:
        return None
    part = name.removeprefix(kind).removeprefix("_")  # a role, or a named subset
    single = single_labels(roles.get(part, labels))

    def only_part(sums_IN: np.ndarray, records: Records) -> np.ndarray:
        is_in_part: list[bool] = [not part or part in (record.speaker, record.subset) for record in records]
        masked_IN: np.ndarray = sums_IN * np.array(is_in_part)[:, None]
        return masked_IN

    if kind == "accuracy":
        return SummedMetric(lambda records: only_part(_right(records), records), _ratio, is_share=True)
    average = _macro if kind == "macro_f1" else _weighted
    return SummedMetric(lambda records: only_part(_counts(records, single), records), average)


def _losses(records: Records) -> np.ndarray:
    """Return [I, 2]: nats, and tokens."""
    return np.array([(record.loss, record.tokens) for record in records], dtype=float)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return _divide(sums[..., 0], sums[..., 1])


def _perplexity(sums: np.ndarray) -> np.ndarray:
    perplexity: np.ndarray = np.exp(np.minimum(700.0, _ratio(sums)))
    return perplexity


def _right(records: Records) -> np.ndarray:
    """Return [I, 2]: 1 for a right prediction, and 1 for each."""
    return np.array([(record.label == record.prediction, 1) for record in records], dtype=float)


def _counts(records: Records, labels: Sequence[str]) -> np.ndarray:
    """Return [I, 3 * L]: true positives, predicted labels, and true labels."""
    true_IL, predicted_IL = (side.astype(float) for side in indicators(records, labels))
    return np.concatenate([true_IL * predicted_IL, predicted_IL, true_IL], axis=1)


def _ngrams(records: Records) -> np.ndarray:
    """Return [I, 2 + 2 * 4]: the lengths of both texts, the n-grams that match, and all predicted n-grams."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU()
    scores = [bleu.corpus_score([record.prediction], [[record.label]]) for record in records]
    return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores], dtype=float)


def _bleu(sums: np.ndarray) -> np.ndarray:
    from sacrebleu.metrics.bleu import BLEU

    def score(sums_N: np.ndarray) -> float:
        predicted, true, *ngrams = sums_N.astype(int).tolist()
        return float(BLEU.compute_bleu(ngrams[:4], ngrams[4:], predicted, true, smooth_method="exp").score)

    return np.apply_along_axis(score, -1, sums)


def _overlaps(records: Records) -> np.ndarray:
    """Return [I, 2]: ROUGE-L, and 1."""
    return np.array([(overlap, 1) for overlap in rouge_l(records)], dtype=float)


TEXT_METRICS = {"bleu": SummedMetric(_ngrams, _bleu), "rouge_l": SummedMetric(_overlaps, _ratio)}


def _by_label(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return F1 and support of each label; F1 is 0 where a label neither occurs nor is predicted."""
    hits, predicted, true = np.split(sums, 3, axis=-1)
    return _divide(2 * hits, predicted + true), true


def _macro(sums: np.ndarray) -> np.ndarray:
    average: np.ndarray = _by_label(sums)[0].mean(-1)
    return average


def _weighted(sums: np.ndarray) -> np.ndarray:
    f1, support = _by_label(sums)
    return _divide((f1 * support).sum(-1), support.sum(-1))


def _divide(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return part / total, and 0 where the total is 0."""
    shares: np.ndarray = np.divide(part, total, out=np.zeros_like(part, dtype=float), where=total > 0)
    return shares


def interval(runs: Sequence[Records], metric: SummedMetric) -> Interval:
    """Return the mean of a metric over trainings, with its 95 % percentile interval.

    Where every prediction is right, or none is, resampling gives no width: then accuracy gets the exact binomial
    interval (Clopper and Pearson, 1934), and any other metric none.

    Args:
        runs: the predictions of each training, on the same items.
        metric: of the predictions.
    """
    sessions = _sessions(runs)
    sums_SGN = _session_sums(runs, sessions, metric)
    value = float(metric.value(sums_SGN.sum(1)).mean())
    low, high = _limits(len(sessions), [len(runs)], lambda drawn, seeds: _mean(metric, sums_SGN, drawn, seeds[0]))
    if low is not None and low == high:
        low, high = _exact(sums_SGN[0].sum(0)) if metric.is_share else (None, None)
    return Interval(value, low, high)


def standard_error(records: Records, metric: SummedMetric) -> float:
    """Return the standard error of a metric over sessions, see `jackknife`."""
    return jackknife(_session_sums([records], _sessions([records]), metric)[0], metric)


def jackknife(sums_GN: np.ndarray, metric: SummedMetric) -> float:
    """Return the standard error of a metric by leaving out one session at a time; 0 with fewer than two sessions.

    The jackknife (Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9, 1981) takes no random
    numbers and a thousandth of the bootstrap's time.
    """
    count = len(sums_GN)
    if count < 2:
        return 0.0
    left_out_G = metric.value(sums_GN.sum(0) - sums_GN)
    return float(np.sqrt((count - 1) / count * ((left_out_G - left_out_G.mean()) ** 2).sum()))


def sums_interval(sessions: Sequence[str], sums_IN: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Return a function of sums over items, with its 95 % percentile interval; nan and no interval where undefined.

    Args:
        sessions: of each item.
        sums_IN: what each item adds.
        value: of the sums, [..., N] → [...].
    """
    names = sorted(set(sessions))
    sums_GN = np.zeros((len(names), sums_IN.shape[1]))
    np.add.at(sums_GN, [names.index(session) for session in sessions], sums_IN)
    whole = float(value(sums_GN.sum(0)))
    if not math.isfinite(whole):
        return Interval(whole, None, None)
    low, high = _limits(len(names), [1], lambda drawn_RG, _: value(sums_GN[drawn_RG].sum(-2)))
    return Interval(whole, None, None) if low == high else Interval(whole, low, high)


def _exact(counts: np.ndarray) -> tuple[float, float]:
    """Return the exact binomial interval of counts[0] right items of counts[1]."""
    from scipy.stats import binomtest

    limits = binomtest(int(counts[0]), int(counts[1])).proportion_ci()
    return float(limits.low), float(limits.high)


def compare(first: Sequence[Records], second: Sequence[Records], metric: SummedMetric, maximize: bool) -> Comparison:
    """Compare two models on the same items, each trained once or several times.

    The interval is that of the difference, with the same sessions drawn for both (a paired bootstrap) and seeds drawn
    for each. McNemar's test (Psychometrika 12, 1947; here its exact form) uses the label that most trainings of a
    model give an item; it ignores that items of a session are not independent, so the interval decides.

    Args:
        first: the predictions of each training of the first model.
        second: those of the second.
        metric: of the predictions.
        maximize: whether more of it is better.

    Raises:
        ValueError: they predict different items.
    """
    if {_key(record) for record in first[0]} != {_key(record) for record in second[0]}:
        raise ValueError("predictions of different items cannot be compared")
    sessions = _sessions(first)
    first_SGN, second_SGN = (_session_sums(runs, sessions, metric) for runs in (first, second))
    value = float(metric.value(first_SGN.sum(1)).mean() - metric.value(second_SGN.sum(1)).mean())

    def difference(drawn: np.ndarray, seeds: Sequence[np.ndarray | None]) -> np.ndarray:
        difference_R: np.ndarray = _mean(metric, first_SGN, drawn, seeds[0]) - _mean(
            metric, second_SGN, drawn, seeds[1]
        )
        return difference_R

    low, high = _limits(len(sessions), [len(first), len(second)], difference)
    is_clear = low is not None and high is not None and low * high > 0
    better = (value > 0) == maximize if is_clear else None
    return Comparison(Interval(value, low, high), better, _mcnemar(vote(first), vote(second)))


def paired_difference(first: Records, second: Records, metric: SummedMetric) -> tuple[float, float]:
    """Return the difference of two trainings in a metric, and its standard error: the jackknife over sessions.

    See Efron and Stein, "The Jackknife Estimate of Variance" (Annals of Statistics 9, 1981). The error is nan where
    there are fewer than two sessions.

    Raises:
        ValueError: they predict different items.
    """
    if {_key(record) for record in first} != {_key(record) for record in second}:
        raise ValueError("predictions of different items cannot be compared")
    sessions = _sessions([first])
    sums_SGN = _session_sums([first, second], sessions, metric)
    whole_SN, count = sums_SGN.sum(1), len(sessions)
    difference = float(np.subtract(*metric.value(whole_SN)))
    if count < 2:
        return difference, math.nan
    without_G = np.subtract(*metric.value(whole_SN[:, None] - sums_SGN))
    return difference, float(np.sqrt((count - 1) * np.mean((without_G - without_G.mean()) ** 2)))


def vote(runs: Sequence[Records]) -> dict[ItemKey, Record]:
    """Return for each item a record with the prediction that most trainings gave; of equals the first one."""
    by_item: dict[ItemKey, list[Record]] = {_key(record): [] for record in runs[0]}
    for run in runs:
        for record in run:
            by_item[_key(record)].append(record)
    chosen = {}
    for key, records in by_item.items():
        most = Counter(record.prediction for record in records).most_common(1)[0][0]
        chosen[key] = next(record for record in records if record.prediction == most)
    return chosen


def _mcnemar(first: Mapping[ItemKey, Record], second: Mapping[ItemKey, Record]) -> float | None:
    from scipy.stats import binomtest

    if not all(record.scores for record in first.values()):
        return None
    right = [(first[key].label == first[key].prediction, second[key].label == second[key].prediction) for key in first]
    only = (right.count((True, False)), right.count((False, True)))
    return float(binomtest(only[0], sum(only)).pvalue) if any(only) else 1.0


def _key(record: Record) -> ItemKey:
    return record.task, record.id


def _sessions(runs: Sequence[Records]) -> list[str]:
    return sorted({record.conversation for record in runs[0]})


def _session_sums(runs: Sequence[Records], sessions: Sequence[str], metric: SummedMetric) -> np.ndarray:
    """Return the sums of each training over each session, [S, G, N]."""
    indices, tables = {session: index for index, session in enumerate(sessions)}, []
    for run in runs:
        sums_IN = metric.item_sums(run)
        sums_GN = np.zeros((len(sessions), sums_IN.shape[1]))
        np.add.at(sums_GN, [indices[record.conversation] for record in run], sums_IN)
        tables.append(sums_GN)
    return np.array(tables)


def _mean(metric: SummedMetric, sums_SGN: np.ndarray, drawn_RG: np.ndarray, seeds_RS: np.ndarray | None) -> np.ndarray:
    """Return the metric over the drawn sessions, averaged over the drawn trainings, [R]."""
    values_RS = np.stack([metric.value(sums_GN[drawn_RG].sum(-2)) for sums_GN in sums_SGN], axis=-1)
    if seeds_RS is not None:
        values_RS = np.take_along_axis(values_RS, np.broadcast_to(seeds_RS, values_RS.shape), axis=-1)
    mean_R: np.ndarray = values_RS.mean(-1)
    return mean_R


def _limits(
    sessions: int, trainings: Sequence[int], statistic: Callable[[np.ndarray, Sequence[np.ndarray | None]], np.ndarray]
) -> tuple[float | None, float | None]:
    """Return percentile limits of a statistic of sessions and, where there are several, of the seeds of each model.

    Resampling both at once counts the part of the variance that belongs to neither twice more, so the interval is
    rather too wide (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007). The percentiles are
    expanded as by Hesterberg ("What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015,
    section 5.2): resampling few sessions makes intervals too narrow, by as much as a t-distribution is wider than a
    normal one.
    """
    from scipy.stats import bootstrap, norm, t

    if sessions < 2:
        return None, None
    has_seeds = [count > 1 for count in trainings]

    def resampled(*samples: np.ndarray, axis: int) -> np.ndarray:
        seeds = iter(samples[1:])
        return statistic(samples[0], [next(seeds) if several else None for several in has_seeds])

    ranges = [np.arange(sessions), *(np.arange(count) for count in trainings if count > 1)]
    level = 1 - 2 * norm.sf(math.sqrt(sessions / (sessions - 1)) * t.ppf((1 + LEVEL) / 2, sessions - 1))
    limits = bootstrap(
        ranges,
        resampled,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(limits.low), float(limits.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
