"""Ratios of makespans count only for equal results, exponents are slopes, and docs/speed.md shows the records."""

from pathlib import Path

import pytest

from tests.bench.growth import Series
from tests.bench.measure import Row
from tests.bench.records import PAGE, page, read, record
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


def test_speed_page_shows_the_committed_records() -> None:
    text, records = PAGE.read_text(encoding="utf-8"), read()
    assert page(text, records) == text, "run `python -m tests.bench --docs`"
    assert all(figures["name"] in text for content in records.values() for figures in content["rows"])


def test_record_keeps_figures_versions_and_machine(tmp_path: Path) -> None:
    record("steps", [Row("step", "loop", [1.0, 3.0, 2.0], goal=1.5, most=True, note="n")], tmp_path)
    content = read(tmp_path)["steps"]
    assert (content["rows"][0]["runs"], content["machine"]["cpus"] >= 1) == ([1.0, 3.0, 2.0], True)
    assert content["versions"].keys() >= {"python", "torch", "ray", "optuna"}
    text = page("<!-- steps: written by `python -m tests.bench --docs` -->\nold\n<!-- end -->", {"steps": content})
    assert "| step | loop | 2 (1 to 3, 3 rounds): n | ≤ 1.5: **missed** |" in text
    assert "old" not in text
