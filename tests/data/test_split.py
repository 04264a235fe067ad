"""Splits: whole groups, seeded, never empty."""

import pytest

from data.errors import DataError
from data.split import split_groups

SIZES = {f"video{number}": 3 + number % 7 for number in range(40)}


def test_every_group_lands_in_one_split_close_to_the_fractions() -> None:
    splits = split_groups(SIZES, (0.7, 0.15, 0.15), seed=0)
    assert splits.keys() == SIZES.keys()
    total = sum(SIZES.values())
    for split, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        own = sum(SIZES[group] for group, where in splits.items() if where == split)
        assert own / total == pytest.approx(share, abs=0.03)


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    again = dict(reversed(SIZES.items()))
    assert split_groups(SIZES, (0.7, 0.15, 0.15), 0) == split_groups(again, (0.7, 0.15, 0.15), 0)
    assert split_groups(SIZES, (0.7, 0.15, 0.15), 0) != split_groups(SIZES, (0.7, 0.15, 0.15), 1)


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(DataError, match="split is empty: 2 group"):
        split_groups({"a": 5, "b": 5}, (0.7, 0.15, 0.15), 0)
