"""A table survives its file, draws have the nearest configuration's results, and a simulated search pays its steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench.tables import table as tables
from tests.bench.tables.simulate import Product, simulate, with_search
from tests.bench.tables.table import Table

RATE, RANK = "train.learning_rate", "model.lora.rank"


@pytest.fixture
def curves() -> Table:
    """Two ranks and three rates over four epochs of 10 steps; the largest rate wins, and leads from the first epoch."""
    points = [{RANK: rank, RATE: rate} for rank in (2, 8) for rate in (1e-3, 1e-2, 1e-1)]
    values_PE = np.array([[0.1 * index + 0.01 * epoch for epoch in range(4)] for index in range(6)])
    space = {RANK: {"choices": [2, 8]}, RATE: {"low": 1e-3, "high": 1e-1, "log": True}}
    values_SFPE, steps_FPE = values_PE[None, None], np.tile([10, 20, 30, 40], (1, 6, 1))
    grid = {RATE: [1e-3, 1e-2, 1e-1]}
    return Table(
        "t",
        "",
        "macro_f1",
        space,
        grid,
        points,
        [0],
        [1.0],
        values_SFPE,
        np.full((1, 1, 6, 4), np.nan),
        1 - values_SFPE,
        steps_FPE,
    )


def test_table_survives_its_file(curves: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert curves.index({RANK: 8, RATE: 0.07}) == 5
    tables.write(curves)
    again = tables.read("t")
    np.testing.assert_allclose(again.values_SFPE, curves.values_SFPE)
    assert (again.points, again.steps_FPE.tolist()) == (curves.points, curves.steps_FPE.tolist())
    assert np.isnan(again.errors_SFPE).all()


def test_product_without_pruning_pays_every_epoch(curves: Table) -> None:
    trace = simulate(curves, Product(with_search(curves.config, trials=4, pruning=None), seed=0), budget=1e9)
    assert (trace.spent, len(trace.ended), trace.lost()) == (160, 4, 0)
    assert trace.regret() == curves.quality(0).max() - max(curves.quality(0)[p] for p in trace.trials.values())


class Pausing:
    """Pauses its first trial after an epoch, and continues it after the second one."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def ask(self, running: Sequence[int]) -> tuple[int, Mapping[str, Any]] | None:
        number = len(self.asked) if len(self.asked) < 2 else 0
        if len(self.asked) == 3 or (number == 0 and running and self.asked):
            return None
        self.asked.append(number)
        return number, {RANK: 2, RATE: 1e-3}

    def report(self, number: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        return number == 0 and epoch == 1

    def complete(self, number: int) -> None:
        pass


def test_paused_trial_continues_after_its_last_epoch(curves: Table) -> None:
    search = Pausing()
    trace = simulate(curves, search, budget=1e9)
    assert (search.asked, [number for _, number in trace.ended], trace.spent) == ([0, 1, 0], [1, 0], 80)
