"""How often a fresh training repeats what a search recommends, with and without further seeds of tied configurations.

A search of TRIALS trainings draws configurations at random, so that only the rule for further seeds differs. It ranks
its configurations, by the mean where some have further seeds; the best TOP of them are trained once more with a seed
that the search has not seen. The recommendation is repeated if it is the best of them again.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sweep.config.schema import Config
from sweep.search.sampling import ties
from tests.bench.measure import Row
from tests.bench.search import interval
from tests.bench.tables.simulate import with_search
from tests.bench.tables.table import Table, names, read

TOP, SEARCHES, ROUNDS, SEEDS = 3, 200, 5, 3
SHARES, TRIALS = (0.0, 0.15, 0.25), (12, 24, 40)


@dataclass(frozen=True)
class Training:
    """A complete trial, as the rule for further seeds reads it."""

    number: int
    point: int  # of the table
    value: float
    error: float
    repeats: int | None = None
    state: str = "COMPLETE"
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    curve: Mapping[int, float] = field(default_factory=dict)
    clock: float = 0.0


def search(table: Table, config: Config, seed: int) -> list[Training]:
    """Return the trials of a search on the trainings of one of the table's seeds, further seeds on those of others."""
    points = np.random.default_rng(seed).permutation(len(table.points)).tolist()
    trials = list[Training]()
    sign = 1 if config.search.direction == "maximize" else -1
    while len(trials) < config.search.trials:
        again = ties.next_repeat(config, trials)
        point = points.pop() if again is None else trials[again[0]].point
        fresh = 0 if again is None else 1 + again[1] - ties.FIRST_SEED
        own = (seed + fresh) % len(table.seeds)
        error = float(np.nan_to_num(table.errors_SFPE[own, -1, point, -1]))
        value = sign * float(table.quality(own)[point])
        trials.append(Training(len(trials), point, value, error, again and again[0]))
    return trials


def recommended(table: Table, trials: list[Training], config: Config, seed: int) -> tuple[bool, float, int]:
    """Return whether a fresh training repeats the recommendation, its value then, and the number of further seeds."""
    best = [trials[trained.number].point for trained in ties.by_mean(config, trials)[:TOP]]
    again = table.quality((seed - 1) % len(table.seeds))[best]
    return bool(again[0] == again.max()), float(again[0]), sum(trial.repeats is not None for trial in trials)


def run() -> list[Row]:
    """Measure each table with several seeds; a round is the share of repeated recommendations over some searches."""
    rows = list[Row]()
    for table in filter(lambda table: len(table.seeds) >= SEEDS, map(read, names())):
        for count in TRIALS:
            for share in SHARES:
                config, found = (
                    with_search(table.config, trials=count, tie_share=share),
                    list[tuple[bool, float, int]](),
                )
                for seed in range(SEARCHES):
                    found.append(recommended(table, search(table, config, seed), config, seed))
                repeated, values, seeds = zip(*found, strict=True)
                size = SEARCHES // ROUNDS
                rounds = [statistics.mean(map(float, repeated[n : n + size])) for n in range(0, SEARCHES, size)]
                note = (
                    f"{statistics.mean(map(float, repeated)):.0%} over all searches; value of the fresh training "
                    f"{interval(list(values))}; {statistics.mean(seeds):.1f} of {count} trainings are further seeds"
                )
                what = f"{table.name}, {count} trainings, search.tie_share {share:g}: recommendation repeated"
                rows.append(Row(what, f"a fresh training of the best {TOP}", rounds, note=note))
    return rows
