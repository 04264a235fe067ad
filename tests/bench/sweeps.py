"""Whole sweeps, from the command to its end, against the stock tools: the same twelve configurations on all sides.

    python -m tests.bench sweeps   # in full
    python -m tests.bench.sweeps   # two trials with a tiny encoder: does it still run?

An encoder of HuBERT-base's size (random weights), an LLM of 20 million parameters, clips with the lengths of AnnoMI's,
at most 4 s. "Mixed" trains the adapter and LoRA in half of the trials, and the top two of the encoder's twelve layers
as well in the others; no trial trains the whole encoder, which no cache can speed up. All trials train to their
end on all sides. A ratio counts only where all sides come to the same values.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus.config import SplitConfig
from sweep.config.files import load, write
from sweep.config.resolve import resolve
from sweep.config.schema import Config
from tests.bench.materials import hubert, llama, made, noise
from tests.bench.measure import Row
from tests.tiny_models import random_hubert

ROUNDS = 1
SESSIONS, TURNS, LONGEST = 5, 8, 4.0  # 24 clips for training, 8 for validation, s
TOP_TWO = "new+encoder.*.layers.10.*+encoder.*.layers.11.*"
STOCK = "Tune + OptunaSearch + ASHA + MLflow callback, a TorchTrainer a trial"
TRAINER = "transformers Trainer.hyperparameter_search (optuna)"
MODULES = {STOCK: "tests.bench.peer_ray", TRAINER: "tests.bench.peer_transformers"}
EQUAL = {STOCK: 0.0, TRAINER: 1e-3}  # relative difference of values; two threads sum in another order than one


@dataclass(frozen=True)
class Size:
    """What is trained."""

    encoder: Callable[[], Path]
    epochs: int
    rates: tuple[float, ...]
    ranks: tuple[int, ...]
    top: str  # what trains in the other half of a mixed sweep


def small_hubert() -> Path:
    """Return an encoder laid out as HuBERT-base, with two narrow layers."""
    return made("small-hubert", lambda folder: random_hubert(folder, norm="group"))


FULL = Size(hubert, epochs=3, rates=(3e-4, 1e-3), ranks=(4, 8, 16), top=TOP_TWO)
SMALL = Size(small_hubert, epochs=2, rates=(1e-3,), ranks=(4,), top="new+encoder.*.layers.1.*")


@dataclass(frozen=True)
class Outcome:
    """How a sweep went."""

    wall: float  # s
    values: dict[str, float]  # of the objective, by parameters
    seconds: list[float]  # that each trial trained


def run(size: Size = FULL) -> list[Row]:
    """The goals of makespans."""
    mixed = points(size.rates, size.ranks, ("new", size.top))
    frozen = points((*size.rates, *(3 * rate for rate in size.rates)), size.ranks, ("new",))
    goals = [(mixed, "mixed", STOCK, 5.0), (frozen, "frozen", STOCK, 8.0), (mixed, "mixed", TRAINER, 4.0)]
    rows = [Row(f"sweep of {len(chosen)} trials, {kind}", peer, [], goal) for chosen, kind, peer, goal in goals]
    for _ in range(ROUNDS):
        own = {kind: sweep(size, chosen) for chosen, kind, _, _ in goals[:2]}
        for row, (chosen, kind, peer, _) in zip(rows, goals, strict=True):
            compare(row, own[kind], sweep(size, chosen, peer), EQUAL[peer])
    return rows


def compare(row: Row, sweep: Outcome, peer: Outcome, allowed: float) -> None:
    """Add a round to a row, unless a trial's values differ by more than is allowed, relatively."""
    costs = []
    for outcome in (peer, sweep):
        least, median, most = min(outcome.seconds), statistics.median(outcome.seconds), max(outcome.seconds)
        costs.append(f"{outcome.wall:.0f} s (a trial trains {median:.0f}, {least:.0f} … {most:.0f} s)")
    row.note = " against ".join(costs) + "; "
    if sweep.values.keys() != peer.values.keys():
        row.note += "OTHER TRIALS, so no ratio"
        return
    apart = [abs(value - peer.values[key]) / abs(value) for key, value in sweep.values.items()]
    row.note += f"values of {len(apart)} trials " + (f"within {max(apart):.0e}" if any(apart) else "equal to the bit")
    if all(difference <= allowed for difference in apart):
        row.runs.append(peer.wall / sweep.wall)
    else:
        row.note += f", MORE THAN {allowed:.0e}, so no ratio"


def points(rates: Sequence[float], ranks: Sequence[int], trainable: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination."""
    names = ("train.learning_rate", "model.lora.rank", "model.trainable")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(rates, ranks, trainable)]


def sweep(size: Size, chosen: list[dict[str, Any]], peer: str | None = None) -> Outcome:
    """A sweep over some points, by `sweep run` or by a peer."""
    config = settings(size, chosen)
    if peer == TRAINER:  # one trial at a time, which gets all CPUs
        config = config.with_values({"resources.cpus_per_worker": os.cpu_count()})
    return makespan(config, MODULES[peer] if peer else None)


def makespan(config: Config, peer: str | None = None, variables: Mapping[str, str] | None = None) -> Outcome:
    """Run a sweep, or the module of a peer, in a new process and folder, without anything computed earlier."""
    inherited = os.environ if variables is None else variables
    environment = {key: value for key, value in inherited.items() if key != "MLFLOW_TRACKING_URI"}
    with tempfile.TemporaryDirectory() as name:
        path, folder = Path(name) / "config.yaml", Path(name) / "sweep"
        write(config, path)
        command = [peer, str(path), str(folder)] if peer else ["sweep", "run", str(path), "--out", str(folder)]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False, env=environment
        )
        wall = time.monotonic() - started
        assert not done.returncode, f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        results = json.loads((folder / "results.json").read_text()) if peer else own_results(folder)
    values = {json.dumps(result["params"], sort_keys=True): result["value"] for result in results}
    return Outcome(wall, values, [result["seconds"] for result in results])


def own_results(folder: Path) -> list[dict[str, Any]]:
    """What `sweep run` found."""
    command = [sys.executable, "-m", "sweep", "status", str(folder), "--json"]
    status = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return [{**trial, "seconds": trial["metrics"]["seconds"]} for trial in status["trials"]]


def settings(size: Size, chosen: list[dict[str, Any]]) -> Config:
    """The sweep over some points."""
    axes = {key: list(dict.fromkeys(point[key] for point in chosen)) for key in chosen[0]}
    corpus = noise("sweeps-corpus", SESSIONS, TURNS, LONGEST, SplitConfig(fractions=(0.6, 0.2, 0.2)))
    config = load("annomi").with_values(
        {
            "name": "makespan",
            "data.shards": str(corpus),
            "data.history": 2,
            "model.modality": "speech",
            "model.encoder.path": str(size.encoder()),
            "model.llm.path": str(llama()),
            "train.batch_size": 8,
            "train.epochs": size.epochs,
            "search.metric": "loss",
            "search.pruning": None,
            "search.trials": len(chosen),
            "search.space": axes,
            "search.points": chosen,
        }
    )
    return resolve(config)


if __name__ == "__main__":
    for row in run(SMALL):
        print(row)
