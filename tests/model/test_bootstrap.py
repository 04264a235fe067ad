"""Intervals and comparisons: the value is that of `summarise`, widths are as statistics predicts, equals are tied."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from model.evaluation.bootstrap import Interval, SummedMetric, compare, interval, summed_metric, vote
from model.evaluation.metrics import Record, summarise
from tests.model.test_metrics import LABELS, ROLES, SETS, record, records, texts

NAMES = ("accuracy", "macro_f1", "weighted_f1", "loss", "accuracy_client", "macro_f1_therapist", "accuracy_hard")


def sums(name: str = "accuracy", labels: Sequence[str] = LABELS) -> SummedMetric:
    result = summed_metric(name, labels, ROLES)
    assert result is not None
    return result


def flipped(rows: Sequence[Record], share: float, seed: int = 0) -> list[Record]:
    """The same items, of which a share is answered rightly whatever was said."""
    drawn = np.random.default_rng(seed).random(len(rows)) < share
    return [
        replace(row, prediction=row.label) if is_flipped else row for row, is_flipped in zip(rows, drawn, strict=True)
    ]


@pytest.mark.parametrize(
    ("task", "name", "labels"),
    [("classify", name, labels) for name in NAMES for labels in (LABELS, SETS)]
    + [("response", name, ()) for name in ("perplexity", "bleu", "rouge_l")],
)
def test_interval_surrounds_the_value_of_the_metric(task: str, name: str, labels: Sequence[str]) -> None:
    spoken = [replace(row, conversation=f"c{index % 7}") for index, row in enumerate(texts())]
    rows = records(sets=labels is SETS) if labels else spoken
    result = interval([rows], sums(name, labels))
    assert result.value == pytest.approx(summarise(rows, {task: labels}, ROLES)[name], rel=1e-12)
    assert result.low < result.value < result.high
    shuffled = [rows[index] for index in np.random.default_rng(1).permutation(len(rows))]
    assert name != "macro_f1" or interval([shuffled], sums(name, labels)) == result


@pytest.mark.parametrize("name", ["ece", "bleu"])
def test_metric_that_resampling_would_shift_has_no_interval(name: str) -> None:
    assert summed_metric(name, LABELS, ROLES) is None


def halves(sessions: int, items: int) -> list[Record]:
    """Half of the sessions are right, and all items of a session agree."""
    return [
        record("change", "change" if session % 2 else "neutral", conversation=f"c{session}", id=f"{session}/{item}")
        for session in range(sessions)
        for item in range(items)
    ]


def width(result: Interval) -> float:
    return result.high - result.low


def test_width_follows_the_number_of_sessions() -> None:
    widths = {case: width(interval([halves(*case)], sums())) for case in ((40, 1), (40, 9), (10, 9))}
    assert widths[40, 1] == widths[40, 9]
    assert widths[40, 9] == pytest.approx(2 * 1.96 * (0.25 / 40) ** 0.5, rel=0.15)
    assert widths[10, 9] == pytest.approx(2 * widths[40, 9], rel=0.15)


def test_one_session_has_no_interval() -> None:
    rows = [row for row in records() if row.conversation == "c0"]
    assert interval([rows], sums()).low is None
    assert compare([rows], [flipped(rows, 0.5)], sums(), maximize=True).better is None


@pytest.mark.parametrize("right", [True, False])
def test_interval_is_exact_where_all_are_right_or_none_is(right: bool) -> None:
    rows = [replace(row, prediction=row.label if right else "nonsense") for row in records(30)]
    result, width = interval([rows], sums()), 1 - 0.025 ** (1 / 30)  # Clopper and Pearson with no failure in 30
    assert (result.low, result.high) == pytest.approx((1 - width, 1.0) if right else (0.0, width))


def test_seeds_that_differ_widen_the_interval() -> None:
    rows = records(400)
    alike = interval([rows, rows, rows], sums())
    apart = interval([rows, flipped(rows, 0.3), flipped(rows, 0.6)], sums())
    assert width(alike) == pytest.approx(width(interval([rows], sums())), rel=0.1)
    assert width(apart) > 1.5 * width(alike)


def test_better_model_beats_and_equal_one_is_tied() -> None:
    rows = records(400)
    better, same = flipped(rows, 0.5), [replace(row) for row in rows]
    result = compare([better], [rows], sums("macro_f1"), maximize=True)
    assert result.better is True
    assert result.mcnemar < 1e-6
    assert result.describe("A", "B").startswith("A beats B by 0.1")
    assert compare([rows], [better], sums("macro_f1"), maximize=True).describe("A", "B").startswith("B beats A by 0.1")
    assert compare([better], [rows], sums("loss"), maximize=False).better is None  # losses are the same
    tied = compare([same], [rows], sums("macro_f1"), maximize=True)
    assert (tied.better, tied.mcnemar, tied.difference.value) == (None, 1.0, 0.0)
    assert tied.describe("A", "B") == "A and B have the same result in every session"
    nearly = compare([flipped(rows, 0.005)], [rows], sums("macro_f1"), maximize=True)
    assert nearly.difference.value > 0
    assert "tied within noise" in nearly.describe("A", "B")


def test_comparison_draws_the_same_sessions_for_both() -> None:
    """Sessions differ much from each other, and the two models differ by the same in each."""
    rows = halves(40, 10)
    better = [replace(row, prediction="change") if row.id.endswith("/0") else row for row in rows]
    result = compare([better], [rows], sums(), maximize=True)
    assert result.better
    assert width(result.difference) < width(interval([rows], sums())) / 3


def test_noise_alone_seldom_beats() -> None:
    """Of 60 pairs of equal models on eleven sessions, three to five are called different; without the correction for
    few sessions it would be ten."""
    wrong = 0
    for seed in range(60):
        rows = records(220, seed=seed)
        first, second = (flipped(rows, 0.3, seed=1000 * side + seed) for side in (1, 2))
        wrong += compare([first], [second], sums(), maximize=True).better is not None
    assert wrong <= 7


def test_vote_takes_the_label_of_most_trainings() -> None:
    votes = {"a": ("change", "neutral", "neutral"), "b": ("change", "change", "neutral"), "c": ("x", "y", "z")}
    runs = [[record("change", labels[seed], id=name) for name, labels in votes.items()] for seed in range(3)]
    assert [record.prediction for record in vote(runs).values()] == ["neutral", "change", "x"]


def test_different_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different items"):
        compare([records(30)], [records(31)], sums(), maximize=True)
