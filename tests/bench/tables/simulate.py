"""Searches that read learning curves from a table: only training is replaced, nothing of a search.

    table = read("six")
    trace = simulate(table, Product(with_search(table.config, trials=1000), seed=3), budget=24 * table.full)
    trace.steps_to(table.target(0, 0.05)), trace.regret(12 * table.full)

`Product` is the study of the product with its sampler and its pruning, in memory and without Ray. Whatever `search`
configures is used, so a variant is a changed configuration. `tests.bench.tables.rivals` has what it is compared with.
A search is asked for a trial whenever one of SLOTS worker groups is free; a trial that paused costs nothing until it is
asked for again, and then continues after its last epoch. Fresh seeds of a configuration are the table's next ones.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna

from sweep.config.schema import Config
from sweep.config.space import SEED
from sweep.search.sampling.ties import FIRST_SEED
from sweep.search.study import StudyStore
from tests.bench.tables.table import Table

SLOTS, ERROR = 2, "standard error"
MOST = 2000  # trials, after which a search has failed


class Search(Protocol):
    """What is simulated."""

    def ask(self, running: Sequence[int]) -> tuple[int, Mapping[str, Any]] | None:
        """Return number and values of the trial to run next, new or paused; None: nothing until a trial reports."""

    def report(self, number: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Take an epoch of a trial; return whether the trial leaves its worker group here."""

    def complete(self, number: int) -> None:
        """Take the end of a trial."""


@dataclass
class Trace:
    """What a search did: points of its trials, and steps at which trials had trained to their end."""

    table: Table
    seed: int  # of the table
    trials: dict[int, int] = field(default_factory=dict)  # number → point
    seeds: dict[int, int] = field(default_factory=dict)  # number → seed of the table
    ended: list[tuple[int, int]] = field(default_factory=list)  # steps spent so far, and number
    spent: int = 0

    def steps_to(self, target: float) -> float:
        """Return the steps until a trial had ended at a quality; infinite where none did."""
        quality = self.table.quality(self.seed)
        return next((float(steps) for steps, number in self.ended if quality[self.trials[number]] >= target), np.inf)

    def winner(self, budget: float = np.inf) -> int | None:
        """Return the number of the best trial that had ended within a budget, by the value that the search saw."""
        quality = self.table.quality(self.seed)
        ended = [number for steps, number in self.ended if steps <= budget]
        return max(ended, key=lambda number: (quality[self.trials[number]], -number), default=None)

    def regret(self, budget: float = np.inf) -> float:
        """Return what the winner lacks to the best point of the table."""
        quality, winner = self.table.quality(self.seed), self.winner(budget)
        return float(quality.max() - (quality.min() if winner is None else quality[self.trials[winner]]))

    def lost(self) -> float:
        """Return what the winner lacks to the best of the trials that were started, had all trained to their end."""
        quality, winner = self.table.quality(self.seed), self.winner()
        best = max(quality[point] for point in self.trials.values())
        return float(best - (quality.min() if winner is None else quality[self.trials[winner]]))


def simulate(
    table: Table,
    search: Search,
    budget: float,
    seed: int = 0,
    shares: Sequence[float] = (1.0,),
    target: float = np.inf,
) -> Trace:
    """Run a search until it has spent its budget of steps, has reached its target, or has nothing left to do.

    Args:
        table: to read from.
        search: of its space.
        budget: steps.
        seed: index of the trainings' seed.
        shares: of the data, that a trial trains on one after another; its epochs are counted over all of them.
        target: quality.
    """
    trace, epochs = Trace(table, seed), dict[int, int]()
    running = list[int]()
    while trace.spent < min(budget, trace.steps_to(target)) and len(trace.trials) < MOST:
        while len(running) < SLOTS and (asked := search.ask(running)) is not None:
            number, values = asked
            fresh = values.get(SEED, FIRST_SEED - 1) - FIRST_SEED + 1
            trace.seeds[number] = (seed + fresh) % len(table.seeds)
            trace.trials.setdefault(number, table.index({key: values[key] for key in values if key != SEED}))
            epochs.setdefault(number, 0)
            running.append(number)
        if not running:
            break
        for number in list(running):
            point, epoch, own = trace.trials[number], epochs[number], trace.seeds[number]
            part, of_part = divmod(epoch, table.epochs)
            share = table.shares.index(shares[part])
            steps = table.steps_FPE[share, point]
            trace.spent += int(steps[of_part] - (steps[of_part - 1] if of_part else 0))
            before = sum(table.steps_FPE[table.shares.index(ended), point, -1] for ended in shares[:part])
            epochs[number] = epoch = epoch + 1
            metrics = {
                table.metric: float(table.values_SFPE[own, share, point, of_part]),
                "steps": float(before + steps[of_part]),
                "seconds": float(before + steps[of_part]),
                "loss": float(table.losses_SFPE[own, share, point, of_part]),
                ERROR: float(np.nan_to_num(table.errors_SFPE[own, share, point, of_part])),
            }
            if search.report(number, epoch, metrics):
                running.remove(number)
            elif epoch == table.epochs * len(shares):
                running.remove(number)
                search.complete(number)
                trace.ended.append((trace.spent, number))
    return trace


class Product:
    """The product's study with its sampler and its pruning."""

    def __init__(self, config: Config, seed: int) -> None:
        config = config.model_copy(update={"seed": seed})
        self.target = config.search.trials
        folder = Path(tempfile.gettempdir()) / "no-sweep"
        self.study = StudyStore(folder, config, optuna.create_study(direction=config.search.direction))

    def ask(self, running: Sequence[int]) -> tuple[int, Mapping[str, Any]] | None:
        """Ask the study."""
        return self.study.ask(running, self.target)

    def report(self, number: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Report to the study."""
        self.study.error = lambda _, metric: metrics[ERROR] if metric == self.study.config.search.metric else 0.0
        return self.study.report(number, epoch, {name: value for name, value in metrics.items() if name != ERROR})

    def complete(self, number: int) -> None:
        """Tell the study."""
        self.study.complete(number)


def with_search(config: Config, **changed: Any) -> Config:
    """Return the configuration of a search with other settings under `search`, such as pruning=None."""
    return config.with_values({f"search.{key}": value for key, value in changed.items()})
