"""Splits that cannot leak: whole groups (videos, people) are dealt to train, val and test."""

from collections.abc import Mapping

import numpy as np

from data.errors import DataError
from data.schema import SPLITS


def split_groups(sizes: Mapping[str, int], fractions: tuple[float, float, float], seed: int) -> dict[str, str]:
    """Deal groups to splits so that the labelled turns in each come close to `fractions`.

    Groups are shuffled by `seed`, then dealt largest first to the split that lacks most, so that one long session
    cannot swallow a small split.

    Args:
        sizes: labelled turns by group; the result does not depend on the mapping's order.
        fractions: shares of train, val and test; they sum to 1.
        seed: of the shuffle that breaks ties between groups of equal size.

    Raises:
        DataError: a split would be empty.
    """
    total = sum(sizes.values())
    order = np.random.default_rng(seed).permutation(sorted(sizes))
    missing = dict(zip(SPLITS, (share * total for share in fractions), strict=True))
    assigned: dict[str, str] = {}
    for group in sorted(order.tolist(), key=lambda name: -sizes[name]):
        split = max(SPLITS, key=lambda name: missing[name])
        assigned[group] = split
        missing[split] -= sizes[group]
    for split in SPLITS:
        if sum(sizes[group] for group, where in assigned.items() if where == split) == 0:
            raise DataError(
                f"the {split} split is empty: {len(sizes)} group(s) with {total} labelled turns are too few to fill "
                "train, val and test without a leak; add sessions"
            )
    return assigned
