"""Steps until a good trial of a search that learns from an earlier sweep, against random search, on tables.

The earlier sweep is the product's own search of EARLIER trainings: on the same table with another seed of the
trainings, or on another table, which has another corpus and other epochs. A misleading one has the same trials with the
worst ones as the best: the search must outvote it. Restricted means, as in `tests.bench.search`.
"""

import functools
import itertools

import numpy as np
import optuna

from sweep.preflight.earlier_sweeps import standardised
from sweep.search.sampling.advice import EarlierSweep
from sweep.search.study import TrialRecord, best_first
from tests.bench.measure import Row
from tests.bench.search import BUDGET, RANDOM, SEARCHES, TOPS, overall, ratios
from tests.bench.tables.rivals import RIVALS
from tests.bench.tables.simulate import MOST, Product, Search, simulate, with_search
from tests.bench.tables.table import Table, names, read

EARLIER, SWEEPS = 24, 20  # trainings of an earlier sweep, and number of different ones
ELSEWHERE = ["another corpus", "other epochs"]


@functools.cache
def trials(name: str, number: int) -> list[TrialRecord]:
    """Return the trials of an earlier sweep, best first, on the trainings of the last seed."""
    table = read(name)
    before = Product(with_search(table.config, pruning=None, trials=EARLIER), 1000 + number)
    simulate(table, before, EARLIER * table.full, len(table.seeds) - 1)
    return best_first(table.config, before.study.trials())


def learning(table: Table, seed: int, source: Table, misleading: bool = False) -> Search:
    """Return a search on a table that learns from one on another table, or on another seed of the same one."""
    config = with_search(table.config, pruning=None, trials=MOST, learn_from=["auto"])
    differs = [] if source.name == table.name else ELSEWHERE
    before = trials(source.name, seed % SWEEPS)
    earlier: EarlierSweep = standardised(config, source.config, before, source.name, differs)
    if misleading:
        turned = [trial.model_copy(update={"value": -trial.value}) for trial in earlier.trials]
        earlier = earlier.model_copy(update={"trials": turned})
    search = Product(config, seed)
    search.study.earlier = [earlier]
    return search


def steps(table: Table, search: Search) -> float:
    """Return the full trainings' worth of steps that a search takes to the target on the first seed, BUDGET at most."""
    target = table.target(0, TOPS[0])
    trace = simulate(table, search, BUDGET * table.full, target=target)
    return min(float(BUDGET), trace.steps_to(target) / table.full)


def run() -> list[Row]:
    """Measure each table with each earlier sweep; a round is a ratio of means over SEARCHES / ROUNDS searches."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows, tables = list[Row](), list(map(read, names()))
    for table in tables:
        random = np.array([steps(table, RIVALS[RANDOM](table.config, seed)) for seed in range(SEARCHES)])
        sources: list[tuple[Table, str, float | None]]
        sources = [(other, f"on the table {other.name}", None) for other in tables if _teaches(other, table)]
        if len(table.seeds) > 1:
            sources += [(table, "of another seed", 3.0)]
        for (source, what, goal), misleads in itertools.product(sources, (False, True)):
            taken = np.array([steps(table, learning(table, seed, source, misleads)) for seed in range(SEARCHES)])
            name = f"{table.name}: steps to the best {TOPS[0]:.0%} with learn_from a sweep {what}"
            note = f"{taken.mean():.1f} trainings in the mean, {np.median(taken):.1f} in the median"
            rows.append(
                Row(
                    f"{name} that misleads" if misleads else name,
                    RANDOM,
                    ratios(taken, random),
                    None if misleads else goal,
                    note=f"{overall(taken, random)}; {note}",
                )
            )
    return rows


def _teaches(source: Table, table: Table) -> bool:
    """Return whether two different tables have the same objective and most of their axes in common."""
    shared = source.space.keys() & table.space.keys()
    return source.name != table.name and source.metric == table.metric and 2 * len(shared) > len(table.space)
