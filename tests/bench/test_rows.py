"""A ratio of makespans counts only where both sides came to the same results; exponents are slopes."""

import pytest

from tests.bench.growth import Series
from tests.bench.measure import Row
from tests.bench.sweeps import Outcome, compare


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ({"a": 0.5, "b": 2.0}, True),
        ({"a": 0.5, "b": 2.00001}, True),
        ({"a": 0.5, "b": 2.01}, False),
        ({"a": 0.5, "b": float("nan")}, False),
        ({"a": float("nan"), "b": 2.0}, False),
        ({"a": 0.5}, False),
        ({"a": 0.5, "c": 2.0}, False),
    ],
)
def test_a_ratio_counts_only_for_the_same_results(values: dict[str, float], counts: bool) -> None:
    row = Row("sweep", "peer")
    compare(row, Outcome(10, {"a": 0.5, "b": 2.0}, [1, 2]), Outcome(50, values, [5, 6]), 1e-4)
    assert row.runs == ([5.0] if counts else [])
    assert ("no ratio" in row.note) == (not counts)


def test_an_exponent_is_the_power_by_which_makespans_grow() -> None:
    series = Series("trials", (1, 10, 100), (3, 3 * 10**1.5, 3 * 100**1.5))
    assert series.exponent == pytest.approx(1.5)
    assert series.last == pytest.approx(1.5)
