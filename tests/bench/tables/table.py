"""Tables of learning curves: every configuration of a grid was trained once for each seed and share of the data.

A table is a compressed JSON file beside this module, which `tests.bench.tables.make` writes:

    about     what was trained
    metric    objective; its direction follows from the name, as in a sweep
    space     axes as in `search.space`, which a search draws from
    grid      by axis that is a range: the values that were trained. A draw between them has the nearest's results.
    points    values of each configuration, by axis
    seeds     of the trainings
    shares    of the training sessions, nested; 1 is last
    values    objective on the validation split after each epoch, [S, F, P, E]
    errors    standard error of it: jackknife over sessions, [S, F, P, E]; null where it is unknown
    losses    loss on the validation split after each epoch, [S, F, P, E]; null where it is unknown
    steps     optimizer steps until the end of an epoch, [F, P, E]

Shapes: S seeds, F shares, P points, E epochs.
"""

import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sweep.config.files import load
from sweep.config.schema import Config

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Table:
    """A table, see above; curves that only have an end have one epoch."""

    name: str
    about: str
    metric: str
    space: dict[str, Any]
    grid: dict[str, list[float]]
    points: list[dict[str, Any]]
    seeds: list[int]
    shares: list[float]
    values_SFPE: np.ndarray
    errors_SFPE: np.ndarray  # nan where unknown
    losses_SFPE: np.ndarray  # nan where unknown
    steps_FPE: np.ndarray

    @property
    def epochs(self) -> int:
        return int(self.values_SFPE.shape[-1])

    @cached_property
    def config(self) -> Config:
        """A sweep over the table's space, with the product's defaults."""
        changed = {"search.space": self.space, "search.points": [], "search.metric": self.metric}
        return load("demo").with_values(changed | {"train.epochs": self.epochs})

    @cached_property
    def by_values(self) -> dict[str, int]:
        return {json.dumps(point, sort_keys=True): index for index, point in enumerate(self.points)}

    def index(self, values: Mapping[str, Any]) -> int:
        """Return the point whose results a draw has."""
        drawn = dict(values)
        for key, grid in self.grid.items():
            if key in drawn:
                scale = math.log if self.space[key].get("log") else float
                drawn[key] = min(grid, key=lambda value: abs(scale(value) - scale(drawn[key])))
        return self.by_values[json.dumps(drawn, sort_keys=True)]

    def quality(self, seed: int) -> np.ndarray:
        """Return the value of each point after its last epoch, negated where less is better, [P]."""
        sign = 1 if self.config.search.direction == "maximize" else -1
        quality: np.ndarray = sign * self.values_SFPE[seed, -1, :, -1]
        return quality

    def target(self, seed: int, top: float) -> float:
        """Return the quality that the best `top` of the points reach."""
        ranked = np.sort(self.quality(seed))[::-1]
        return float(ranked[math.ceil(top * len(ranked)) - 1])

    @property
    def full(self) -> float:
        """Mean steps of a full training."""
        return float(self.steps_FPE[-1, :, -1].mean())


def read(name: str) -> Table:
    """Return the table of a name; `names` lists them."""
    with gzip.open(FOLDER / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        content = json.load(file)
    arrays = {key: np.array(content.pop(key), dtype=float) for key in ("values", "errors", "losses", "steps")}
    return Table(
        **content,
        values_SFPE=arrays["values"],
        errors_SFPE=arrays["errors"],
        losses_SFPE=arrays["losses"],
        steps_FPE=arrays["steps"].astype(int),
    )


def names() -> list[str]:
    """Return the names of all tables."""
    return sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))


def write(table: Table) -> None:
    """Write a table; the same table gives the same bytes."""
    content = {key: value for key, value in vars(table).items() if not isinstance(value, np.ndarray | Config)}
    content.pop("by_values", None)
    arrays = {"values": table.values_SFPE, "errors": table.errors_SFPE, "losses": table.losses_SFPE}
    for key, array in arrays.items():
        content[key] = np.where(np.isnan(array), None, np.round(array, 4)).tolist()
    content["steps"] = table.steps_FPE.tolist()
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    with (FOLDER / f"{table.name}.json.gz").open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.encode())
