"""How often a fresh training repeats what a search recommends, with and without further seeds of tied configurations.

Searches have TRIALS trainings in all. Each ranks its configurations, by the mean where some have further seeds; the
best TOP of them are trained once more with a seed that the search has not seen. The recommendation is repeated if it is
the best of them again.
"""

import statistics

import optuna

from sweep.search.study import best_first
from tests.bench.measure import Row
from tests.bench.search import interval
from tests.bench.tables.simulate import Product, simulate, with_search
from tests.bench.tables.table import Table, names, read

TRIALS, TOP, SEARCHES, ROUNDS, SEEDS = 24, 3, 100, 5, 3
SHARES = (0.0, 0.15, 0.25)


def recommended(table: Table, share: float, seed: int) -> tuple[bool, float, int]:
    """Return whether a fresh training repeats the recommendation, its value then, and the number of further seeds."""
    search = Product(with_search(table.config, trials=TRIALS, tie_share=share), seed)
    first = seed % len(table.seeds)
    trace = simulate(table, search, 10 * TRIALS * table.full, first)
    trials = search.study.trials()
    ranked = [trace.trials[trial.number] for trial in best_first(search.study.config, trials)[:TOP]]
    again = table.quality((first - 1) % len(table.seeds))[ranked]
    return bool(again[0] == again.max()), float(again[0]), sum(trial.repeats is not None for trial in trials)


def run() -> list[Row]:
    """Measure each table with several seeds; a round is the share of repeated recommendations over some searches."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = list[Row]()
    for table in filter(lambda table: len(table.seeds) >= SEEDS, map(read, names())):
        for share in SHARES:
            found = [recommended(table, share, seed) for seed in range(SEARCHES)]
            size = SEARCHES // ROUNDS
            rounds = [
                statistics.mean(float(again) for again, *_ in found[first : first + size])
                for first in range(0, SEARCHES, size)
            ]
            repeated, values, seeds = zip(*found, strict=True)
            note = (
                f"{statistics.mean(map(float, repeated)):.0%} over all searches; value of the fresh training "
                f"{interval(list(values))}; {statistics.mean(seeds):.1f} of {TRIALS} trainings are further seeds"
            )
            what = f"{table.name}, search.tie_share {share:g}: recommendation repeated"
            rows.append(Row(what, f"a fresh training of the best {TOP}", rounds, note=note))
    return rows
