"""How the makespan of a sweep grows with its trials, its corpus, the workers that share it, and the nodes they are on.

    python -m tests.bench.growth docs/growth.png   # the same, drawn

Tiny models, a frozen encoder whose pass is part of the makespan, clips with the lengths of AnnoMI's. A makespan that
grows as size^k is a line of slope k on logarithmic scales; start-up, which does not grow, makes k smaller.
"""

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.corpus.schema import SAMPLE_RATE
from data.shards.dataset import Shards
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.config.schema import Config
from tests.bench.materials import noise
from tests.bench.measure import Row
from tests.bench.records import machine
from tests.bench.sweeps import makespan
from tests.sweep.cluster import cluster, until

TRIALS, MIDDLE = (8, 16, 32), 16
HOURS, FEW = (1, 3, 10), 4  # of sound; the trials that read them
WORKERS = (1, 2)
NODES = (1, 2, 4)  # raylets on this machine, each with one CPU for a trial
ALIVE = ("nodes", "--filter", "state=ALIVE")  # of `ray list`
SESSIONS, CLIPS = 12, 70  # of an hour


@dataclass(frozen=True)
class Series:
    """Makespans at several sizes."""

    name: str
    sizes: Sequence[float]
    walls: Sequence[float]  # s
    goal: float | None = None

    @property
    def exponent(self) -> float:
        """The slope of a line through all points, on logarithmic scales."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.walls), 1)[0])

    @property
    def last(self) -> float:
        """The slope between the two largest sizes, where start-up matters least."""
        return math.log(self.walls[-1] / self.walls[-2]) / math.log(self.sizes[-1] / self.sizes[-2])


def run() -> list[Row]:
    """The goals of growth: nothing grows faster than its cause."""
    return [
        Row(
            f"exponent of the makespan: {series.name}",
            ", ".join(f"{size:.3g}" for size in series.sizes),
            [series.exponent],
            series.goal,
            most=True,
            note=", ".join(f"{wall:.0f}" for wall in series.walls) + f" s; {series.last:.2f} between the last two",
        )
        for series in measured()
    ]


def measured() -> list[Series]:
    """All series; sweeps that they have in common run once."""
    wall = functools.cache(lambda *case: makespan(settings(*case)).wall)
    both = max(WORKERS)
    hours_of_audio = [sum(Shards(sound(hours)).columns["n_samples"]) / SAMPLE_RATE / 3600 for hours in HOURS]
    return [
        Series("trials", TRIALS, [wall(number, HOURS[0], both, 1) for number in TRIALS], goal=1.0),
        Series("hours of audio", hours_of_audio, [wall(FEW, hours, both, 1) for hours in HOURS], goal=1.0),
        Series("workers, a trial each", WORKERS, [wall(MIDDLE, HOURS[0], slots, 1) for slots in WORKERS]),
        Series("workers, sharing a trial", WORKERS, [wall(MIDDLE, HOURS[0], 1, workers) for workers in WORKERS]),
        Series("nodes, a trial each", NODES, [on_nodes(count) for count in NODES]),
    ]


def on_nodes(count: int) -> float:
    """Return the makespan on a cluster that runs already."""
    with cluster() as made:
        until(lambda: made.answers("job", "list"), 90, lambda: "the cluster")
        for nodes in range(2, count + 1):
            made.add()
            until(lambda nodes=nodes: len(made.listed(*ALIVE)) == nodes, 90, lambda: "a node")
        config = settings(MIDDLE, HOURS[0], count, 1)
        return makespan(config, variables=made.environment | {"RAY_ADDRESS": made.address}).wall


def settings(trials: int, hours: int, slots: int, workers: int) -> Config:
    """Return a sweep over learning rate and rank, none of whose trials ends early."""
    config = load("demo").with_values(
        {
            "name": "growth",
            "data.shards": str(sound(hours)),
            "train.epochs": 1,
            "search.trials": trials,
            "search.pruning": None,
            "search.space": {
                "train.learning_rate": {"low": 5e-4, "high": 1e-2, "log": True},
                "model.lora.rank": [2, 8, 16],
            },
            "search.points": [],
            "resources.slots": slots,
            "resources.workers": workers,
        }
    )
    return resolve(config)


def sound(hours: int) -> Path:
    """Return a corpus of about as many hours."""
    return noise(f"growth-{hours}", SESSIONS, CLIPS * hours)


def draw(all_series: Sequence[Series], path: Path) -> None:
    """All series as points, with their lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(
        1, len(all_series), figsize=(3.2 * len(all_series), 3.4), sharey=True, layout="constrained"
    )
    for axis, series in zip(axes, all_series, strict=True):
        slope, offset = np.polyfit(np.log(series.sizes), np.log(series.walls), 1)
        axis.loglog(series.sizes, series.walls, "o", color="tab:blue")
        line = [math.exp(offset) * size**slope for size in series.sizes]
        axis.loglog(series.sizes, line, color="tab:gray", label=f"exponent {slope:.2f}")
        axis.set_xticks(series.sizes, [f"{size:.3g}" for size in series.sizes])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.set_xlabel(series.name)
        axis.legend()
    axes[0].set_ylabel("makespan (s)")
    figure.suptitle(f"A sweep of tiny models, from the command to its end; {machine()['name']}", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(series := measured(), Path(sys.argv[1]))
    for each in series:
        print(f"{each.name}: exponent {each.exponent:.2f}", dict(zip(each.sizes, each.walls, strict=True)))
