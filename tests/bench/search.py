"""Optimizer steps until a search has a good trial, and its regret: this search against others, on tables.

A tabular benchmark, as NAS-Bench-201 and HPOBench are (see `tests.bench.tables.table`). Only training is replaced: the
study, its sampler and its pruning are the product's own, with their defaults, and the rivals run their own code. Each
search has a budget of the largest of BUDGETS. Steps are compared as restricted means: a search that does not reach its
target within BUDGET full trainings counts with all of these, so a ratio is rather too near to 1.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna

from tests.bench.measure import Row
from tests.bench.tables.rivals import RIVALS, Known, Make
from tests.bench.tables.simulate import MOST, Product, Trace, simulate, with_search
from tests.bench.tables.table import Table, names, read

SEARCHES, ROUNDS, BUDGET = 100, 5, 24
LOST = 0.02  # share of the searches that may lose their best trial
TOPS = (0.05, 0.025)  # targets: what this share of a table's points reaches
BUDGETS = (12, 24, 48)  # full trainings, after which the regret is reported
RANDOM = "random, full length"


def product(**search: Any) -> Make:
    """Return the product's search with other settings."""
    return lambda config, seed: Product(with_search(config, trials=MOST, **search), seed)


DEFAULTS, ASHA, KNOWN = "the defaults", "Ray ASHA + OptunaSearch", "a search that knows all other results"
OURS: dict[str, Make] = {
    DEFAULTS: product(),
    "no pruning": product(pruning={"kind": "none"}),
    "random draws, promote": product(sampler="random", pruning={"kind": "promote"}),
}


def play(table: Table, make: Make) -> list[Trace]:
    """Run searches that differ by their seed, each on the trainings of one of the table's seeds."""
    return [
        simulate(table, make(table.config, seed), BUDGETS[-1] * table.full, seed % len(table.seeds))
        for seed in range(SEARCHES)
    ]


def sweeps(table: Table, **search: Any) -> list[Trace]:
    """Run the product's search as sweeps of BUDGET trials, which end by themselves."""
    config = with_search(table.config, trials=BUDGET, **search)
    return [simulate(table, Product(config, seed), np.inf, seed % len(table.seeds)) for seed in range(SEARCHES)]


def bound(table: Table) -> list[Trace]:
    """Run the search that knows the table on the trainings of each of its seeds, as often as the others."""
    known = [
        simulate(table, Known(table, seed), BUDGETS[-1] * table.full, seed)
        for seed in range(min(SEARCHES, len(table.seeds)))
    ]
    return [known[seed % len(known)] for seed in range(SEARCHES)]


def steps(traces: list[Trace], top: float) -> np.ndarray:
    """Return the full trainings' worth of steps that each search took to the target, BUDGET at most."""
    taken = [trace.steps_to(trace.table.target(trace.seed, top)) / trace.table.full for trace in traces]
    return np.minimum(taken, BUDGET)


def ratios(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Return how many times fewer steps the first searches took, for each round."""
    sides = (np.array_split(side, ROUNDS) for side in (ours, theirs))
    return [float(theirs.mean() / ours.mean()) for ours, theirs in zip(*sides, strict=True)]


def overall(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Return the ratio over all searches with its 95 % interval, by resampling searches."""
    rng = np.random.default_rng(0)
    resampled = [rng.choice(theirs, len(theirs)).mean() / rng.choice(ours, len(ours)).mean() for _ in range(2000)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{theirs.mean() / ours.mean():.2f} [{low:.2f}, {high:.2f}] over all searches"


def interval(values: list[float]) -> str:
    """Return a mean with its 95 % interval over searches (normal)."""
    width = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {width:.3f}"


def regrets(traces: list[Trace]) -> str:
    """Return the mean regret after each budget."""
    full = traces[0].table.full
    return ", ".join(interval([trace.regret(budget * full) for trace in traces]) for budget in BUDGETS)


def repeated(table: Table, traces: list[Trace]) -> str:
    """Return how often the winner is still among the best 5 % in trainings with another seed."""
    if len(table.seeds) == 1:
        return ""
    kept = []
    for trace in traces:
        other, winner = (trace.seed + 1) % len(table.seeds), trace.winner()
        quality = table.quality(other)
        kept.append(winner is not None and quality[trace.trials[winner]] >= table.target(other, TOPS[0]))
    return f"; the winner is in the best 5 % with another seed, too, in {np.mean(kept):.0%}"


def run(show: Callable[[str], object] = lambda line: print(line, file=sys.stderr)) -> list[Row]:
    """Measure all searches on all tables; a round is a ratio of restricted means over SEARCHES / ROUNDS searches."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = list[Row]()
    for name in names():
        table = read(name)
        random, ours = play(table, RIVALS[RANDOM]), list[Trace]()
        for search, make in {**OURS, **RIVALS, KNOWN: None}.items():
            traces = random if search == RANDOM else bound(table) if make is None else play(table, make)
            taken, reference = steps(traces, TOPS[0]), steps(random, TOPS[0])
            note = (
                f"{overall(taken, reference)}; {taken.mean():.1f} trainings, and {steps(traces, TOPS[1]).mean():.1f} "
                f"to the best {TOPS[1]:.1%}; regret {regrets(traces)}"
                f"{repeated(table, traces)}"
            )
            goal = 1.5 if search == DEFAULTS else None
            what = f"{name}, {search}: steps to the best {TOPS[0]:.0%}"
            rows.append(Row(what, RANDOM, ratios(taken, reference), goal, note=note))
            show(f"{what}: {note}")
            if search == DEFAULTS:
                ours = traces
            elif search == ASHA:
                what = f"{name}, {DEFAULTS}: steps to the best {TOPS[0]:.0%}"
                rows.append(
                    Row(what, ASHA, ratios(steps(ours, TOPS[0]), taken), 1.3, note=overall(steps(ours, TOPS[0]), taken))
                )
        rows.append(lost(table))
        show(f"{rows[-1].name}: {rows[-1].ratio:.0%}; {rows[-1].note}")
    return rows


def lost(table: Table) -> Row:
    """Return how often a sweep of BUDGET trials ends with another winner than the best of its trials would have been.

    That is what pruning costs: the best trial was paused, or pruned, and not finished.
    """
    pruned, unpruned = sweeps(table), sweeps(table, pruning={"kind": "none"})
    trainings = [interval([trace.spent / table.full for trace in traces]) for traces in (pruned, unpruned)]
    regret = [interval([trace.regret() for trace in traces]) for traces in (pruned, unpruned)]
    note = (
        f"{interval([trace.lost() for trace in pruned])} lost in the mean; {trainings[0]} trainings and a regret of "
        f"{regret[0]}, against {trainings[1]} and {regret[1]} without pruning"
    )
    share = float(np.mean([trace.lost() > 0 for trace in pruned]))
    name = f"{table.name}, {DEFAULTS}, {BUDGET} trials: best trial lost"
    return Row(name, "searches", [share], LOST, most=True, note=note)
