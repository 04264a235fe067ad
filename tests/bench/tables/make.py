"""Train every configuration of a grid once for each seed and share of the data, and write a table of the results.

    python -m tests.bench.tables.make small six

A number after the name, six:0, trains only with that seed, and a second one, six:0:1.0, on that share of the data.

Trainings run one after another in this process, with cached features and warm models. What is done is kept in the
benchmark's cache, so the command may be ended and rerun. Shares of the data are those of `search.fidelity: data`.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.corpus import synthetic
from data.corpus.config import CorpusConfig, SplitConfig
from data.loading.cached_arrays import CacheFolders
from data.preparation.build import prepare
from model.evaluation.bootstrap import jackknife, summed_metric
from model.training.trainer import fit
from sweep.analysis.predictions import read_predictions
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.config.schema import Config
from sweep.execution.trial import build
from sweep.preflight.feature_cache import ENCODER_FEATURES
from tests.bench.materials import CACHE, compute, made
from tests.bench.tables.table import Table, write

RATE, MODALITY = "train.learning_rate", "model.modality"
SEEDS = (0, 1, 2)
MEMORY = "/dev/shm"  # so that checkpoints wait for no disk


@dataclass(frozen=True)
class Recipe:
    """What is trained for a table."""

    about: str
    settings: Callable[[], Config]  # with the search space
    grid: dict[str, list[Any]]  # values of the axes that are ranges
    shares: tuple[float, ...]


def rates(low: float, high: float, count: int) -> list[float]:
    return [float(f"{rate:.3g}") for rate in np.geomspace(low, high, count)]


def changed(preset: str, shards: Path, space: dict[str, Any], **settings: Any) -> Config:
    values = {"data.shards": str(shards), "search.space": space, "search.points": [], "resources.cpus_per_worker": 1}
    return resolve(load(preset).with_values(values | settings))


def small() -> Config:
    """The demo's models on 440 clips, with the default number of epochs."""
    parts = CorpusConfig(split=SplitConfig(fractions=(0.55, 0.36, 0.09)))  # twelve sessions train, eight validate
    corpus = made("search-corpus", lambda folder: prepare(synthetic.corpus(sessions=22, turns=40), folder, parts))
    space = {
        MODALITY: ["speech"],
        "model.adapter.kind": {"choices": ["pool", "conv"], "when": {MODALITY: ["speech"]}},
        "model.lora.rank": [2, 16],
        "train.batch_size": [4, 8],
        RATE: {"low": SMALL_RATES[0], "high": SMALL_RATES[-1], "log": True},
    }
    return changed(
        "demo", corpus, space, **{"data.history": 0, "model.lora.targets": ["q_proj", "v_proj"], "train.epochs": 5}
    )


def six() -> Config:
    """The demo's models on other sessions: six axes, eight epochs."""
    parts = CorpusConfig(split=SplitConfig(fractions=(0.55, 0.36, 0.09)))
    corpus = made(
        "search-corpus-2", lambda folder: prepare(synthetic.corpus(sessions=33, turns=16, seed=7), folder, parts)
    )
    space = {
        MODALITY: ["speech", "text"],
        "model.adapter.kind": {"choices": ["pool", "conv", "stack"], "when": {MODALITY: ["speech"]}},
        "model.lora.rank": [2, 16],
        "train.batch_size": [8, 16],
        "train.schedule": ["linear", "constant"],
        RATE: {"low": SIX_RATES[0], "high": SIX_RATES[-1], "log": True},
    }
    return changed(
        "demo", corpus, space, **{"data.history": 0, "model.lora.targets": ["q_proj", "v_proj"], "train.epochs": 8}
    )


SMALL_RATES, SIX_RATES = rates(5e-4, 2e-2, 6), rates(3e-4, 3e-2, 7)
RECIPES = {
    "small": Recipe(
        "tiny models on the audio of 440 synthetic clips, 5 epochs", small, {RATE: SMALL_RATES}, (0.25, 1.0)
    ),
    "six": Recipe("tiny models, 264 synthetic clips, 8 epochs", six, {RATE: SIX_RATES}, (0.25, 1.0)),
}


def points(config: Config, grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Return every combination of the values, without those whose condition does not hold."""
    space, seen = config.search.space, set[str]()
    values = {key: grid.get(key) or axis.choices for key, axis in space.items()}
    for combination in itertools.product(*(values[key] or [] for key in space)):
        point = dict(zip(space, combination, strict=True))
        kept = {key: value for key, value in point.items() if config.search.is_varied(key, point, {})}
        if (name := json.dumps(kept, sort_keys=True)) not in seen:
            seen.add(name)
            yield kept


def trained(config: Config, share: float) -> list[dict[str, Any]]:
    """Train a configuration, and return for each epoch its metrics, and the objective's sums by session."""
    features = compute(requests) if (requests := ENCODER_FEATURES.requests(config, CACHE)) else ()
    model, data = build(config, "local", ("train", "val"), "cpu", CacheFolders(features), share=share)
    curve, clock = list[dict[str, Any]](), [time.process_time()]
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:

        def report(_: int, metrics: dict[str, Any]) -> None:
            [(labels, records)] = read_predictions(Path(folder)).values()
            metric = summed_metric(config.search.metric, labels, {})
            assert metric is not None
            sums = metric.item_sums(records)
            sessions = sorted({record.conversation for record in records})
            by_session = [
                sums[[record.conversation == session for record in records]].sum(0).round(3).tolist()
                for session in sessions
            ]
            now = time.process_time()
            curve.append(metrics | {"sums": by_session, "cpu_seconds": now - clock[0]})
            clock[0] = now

        fit(model, data, config.train, config.tasks, config.seed, Path(folder), report)
    return curve


def make(name: str, seed_only: str = "", share_only: str = "") -> None:
    """Train what is missing of a table; write it once nothing is."""
    recipe = RECIPES[name]
    config, path = recipe.settings(), CACHE / f"table-{name}.jsonl"
    torch.set_num_threads(1)
    known = dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}
    grid = list(points(config, recipe.grid))
    jobs = [(seed, share, point) for share in reversed(recipe.shares) for seed in SEEDS for point in grid]
    for number, (seed, share, point) in enumerate(jobs):
        key = json.dumps([point, share, seed], sort_keys=True)
        if key in known or int(seed_only or seed) != seed or float(share_only or share) != share:
            continue
        known[key] = trained(config.for_trial(point).model_copy(update={"seed": seed}), share)
        with path.open("a") as file:
            file.write(json.dumps([key, known[key]]) + "\n")
        if number % 20 == 0:
            print(f"{name}: {number + 1} of {len(jobs)}, {time.process_time():.0f} CPU-seconds", flush=True)
    write(collect(name, recipe, config, grid, known))


def collect(
    name: str, recipe: Recipe, config: Config, grid: list[dict[str, Any]], known: dict[str, list[dict[str, Any]]]
) -> Table:
    """Return the table of the seeds that all configurations have, and of the shares that these have."""
    search = config.search
    has = lambda share, seed: all(json.dumps([p, share, seed], sort_keys=True) in known for p in grid)  # noqa: E731
    seeds = [seed for seed in SEEDS if has(1.0, seed)]
    shares = [share for share in recipe.shares if all(has(share, seed) for seed in seeds)]
    space = {key: axis.model_dump(exclude_defaults=True) for key, axis in search.space.items()}

    def array(of: Callable[[list[dict[str, Any]]], list[Any]]) -> np.ndarray:
        """Return a list of each training, [S, F, P, E]."""
        key = lambda *what: json.dumps(what, sort_keys=True)  # noqa: E731
        return np.array([[[of(known[key(p, f, s)]) for p in grid] for f in shares] for s in seeds])

    values = array(lambda curve: [epoch[search.metric] for epoch in curve])
    metric = summed_metric(search.metric, ["label"], {})
    assert metric is not None
    errors = array(lambda curve: [jackknife(np.array(epoch["sums"]), metric) for epoch in curve])
    losses = array(lambda curve: [epoch["loss"] for epoch in curve])
    steps = array(lambda curve: [epoch["steps"] for epoch in curve])[0]
    return Table(
        name, recipe.about, search.metric, space, recipe.grid, grid, seeds, shares, values, errors, losses, steps
    )


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        make(*asked.split(":"))
