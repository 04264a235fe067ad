"""Steps until a good trial of a search that learns from an earlier sweep, against random search, on tables.

The earlier sweep is the product's own search of EARLIER trainings on the same table with another seed of the trainings.
A misleading one has the same trials with the worst ones as the best: the search must outvote it.
"""

import statistics

import optuna

from sweep.preflight.earlier_sweeps import standardised
from sweep.search.study import TrialRecord, best_first
from tests.bench.measure import Row
from tests.bench.tables.rivals import RIVALS
from tests.bench.tables.simulate import MOST, Product, Search, simulate, with_search
from tests.bench.tables.table import Table, names, read

EARLIER, SEARCHES, ROUNDS, BUDGET, TOP = 24, 4, 5, 24, 0.05
RANDOM, RANDOM_SEARCHES = "random, full length", 100


def learning(table: Table, seed: int, misleading: bool) -> Search:
    """Return a search on the trainings of seed 0 that learns from one on the trainings of the last seed."""
    config = with_search(table.config, pruning=None, trials=MOST, learn_from=["auto"])
    before = Product(with_search(table.config, pruning=None, trials=EARLIER), 1000 + seed)
    simulate(table, before, EARLIER * table.full, len(table.seeds) - 1)
    trials: list[TrialRecord] = best_first(config, before.study.trials())
    earlier = standardised(config, config, trials, "before", [])
    if misleading:
        turned = [trial.model_copy(update={"value": -trial.value}) for trial in earlier.trials]
        earlier = earlier.model_copy(update={"trials": turned})
    search = Product(config, seed)
    search.study.earlier = [earlier]
    return search


def steps(table: Table, search: Search, budget: int) -> float:
    """Return the full trainings' worth of steps that a search takes to the target, the budget at most."""
    trace = simulate(table, search, budget * table.full, 0)
    return min(float(budget), trace.steps_to(table.target(0, TOP)) / table.full)


def run() -> list[Row]:
    """Measure each table with several seeds; a round is a ratio of means over SEARCHES searches."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = list[Row]()
    for table in filter(lambda table: len(table.seeds) > 1, map(read, names())):
        theirs = [steps(table, RIVALS[RANDOM](table.config, seed), 2 * BUDGET) for seed in range(RANDOM_SEARCHES)]
        for kind, goal in (("learn_from", 3.0), ("learn_from what misleads", None)):
            row, taken = Row(f"{table.name}: steps to the best 5 % with {kind}", RANDOM, goal=goal), list[float]()
            for first in range(0, ROUNDS * SEARCHES, SEARCHES):
                seeds = range(first, first + SEARCHES)
                ours = [steps(table, learning(table, seed, goal is None), BUDGET) for seed in seeds]
                row.runs.append(statistics.mean(theirs) / statistics.mean(ours))
                taken += ours
            row.note = (
                f"{statistics.mean(taken):.1f} trainings in the mean, {statistics.median(taken):.1f} in the median"
            )
            rows.append(row)
    return rows
