"""Optimizer steps until a trial reaches a target macro-F1: this search against random search at full length.

A tabular benchmark, as NAS-Bench-201 and HPOBench are: each point of a grid over a space that a user would search was
trained once, by `fit`, on a small synthetic corpus. Then many searches, which differ by their seed, read the learning
curves from the table. Only training is replaced: the ledger, its sampler, its pruning and its audit are the product's
own, with their defaults.
"""

import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from data.corpus import synthetic
from data.corpus.config import CorpusConfig, SplitConfig
from data.loading.cached_arrays import CacheFolders
from data.preparation.build import prepare
from model.training.trainer import fit
from sweep.config.files import load
from sweep.config.loader import flat
from sweep.config.resolve import resolve
from sweep.config.schema import Config
from sweep.execution.trial import build
from sweep.preflight.feature_cache import ENCODER_FEATURES
from sweep.search.study import StudyStore
from tests.bench.materials import CACHE, compute, made
from tests.bench.measure import Row

RATE, MODALITY = "train.learning_rate", "model.modality"
RATES = [float(f"{rate:.3g}") for rate in np.geomspace(5e-4, 2e-2, 6)]  # a draw between them has the nearest's curve
SPACE: dict[str, Any] = {
    MODALITY: ["speech", "text"],
    "model.adapter.kind": {"choices": ["pool", "conv"], "when": {MODALITY: ["speech"]}},
    "model.lora.rank": [2, 16],
    "train.batch_size": [4, 8],
    RATE: {"low": RATES[0], "high": RATES[-1], "log": True},
}
TOPS = (0.05, 0.025)  # targets: what this share of the table's points reaches
SLOTS, ROUNDS, SEEDS = 2, 5, 40
LIMIT = 400  # trials, after which a search has failed
TABLE = "search-1.jsonl"  # another number for every change of what is trained


def settings() -> Config:
    """Return the demo's models on 440 clips, with the default number of epochs."""
    parts = CorpusConfig(split=SplitConfig(fractions=(0.55, 0.36, 0.09)))  # twelve sessions train, eight validate
    corpus = made("search-corpus", lambda folder: prepare(synthetic.corpus(sessions=22, turns=40), folder, parts))
    changed: dict[str, Any] = {
        "data.shards": str(corpus),
        "data.history": 0,
        "model.lora.targets": ["q_proj", "v_proj"],
        "train.epochs": 5,
        "search.space": SPACE,
        "search.points": [],
    }
    return resolve(load("demo").with_values(changed))


def points() -> Iterator[dict[str, Any]]:
    """The grid."""
    axes = {
        key: RATES if key == RATE else axis["choices"] if isinstance(axis, dict) else axis
        for key, axis in SPACE.items()
    }
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        if point[MODALITY] == "speech" or point.pop("model.adapter.kind") == "pool":
            yield point


Curve = list[dict[str, Any]]  # what was reported, by epoch


def table(config: Config) -> dict[str, Curve]:
    """Return the metrics of all points, by `key`; train those that are missing, as `sweep train` does."""
    path = CACHE / TABLE
    curves = dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}
    for point in points():
        if (name := key(point)) in curves:
            continue
        trial, curve = config.for_trial(point), list[dict[str, Any]]()
        features = compute(ENCODER_FEATURES.requests(trial, CACHE)) if trial.model.uses_audio else ()
        model, data = build(trial, "local", ("train", "val"), "cpu", CacheFolders(features))
        with tempfile.TemporaryDirectory() as folder:
            report = lambda _, metrics, curve=curve: curve.append(metrics)  # noqa: E731
            fit(model, data, trial.train, trial.tasks, trial.seed, Path(folder), report)
        curves[name] = curve
        with path.open("a") as file:
            file.write(json.dumps([name, curve]) + "\n")
    return curves


def key(values: Mapping[str, Any]) -> str:
    """Return the name of the grid's point that is nearest to a draw."""
    nearest = min(RATES, key=lambda rate: abs(math.log(rate / values[RATE])))
    return json.dumps({**values, RATE: nearest}, sort_keys=True)


@dataclass
class Spent:
    """What a search took until a trial that trained to its end was good enough."""

    trials: int = 0
    steps: int = 0


Ask = Callable[[list[int]], tuple[int, dict[str, Any]]]
Judge = Callable[[int, int, dict[str, Any]], bool]


def play(
    curves: Mapping[str, Curve], metric: str, target: float, ask: Ask, report: Judge, complete: Callable[[int], None]
) -> Spent:
    """Run trials in SLOTS worker groups, which take the same time for an epoch, until one has ended at the target.

    `ask` returns number and values of the next trial, given the numbers of those that run; `report` gets number, epoch
    and metrics, and returns whether the trial ends there.
    """
    running: dict[int, tuple[Curve, int]] = {}
    spent = Spent()
    while spent.trials < LIMIT:
        while len(running) < SLOTS:
            number, values = ask(list(running))
            running[number] = curves[key(values)], 0
            spent.trials += 1
        for number, (curve, epoch) in list(running.items()):
            spent.steps += curve[epoch]["steps"] - (curve[epoch - 1]["steps"] if epoch else 0)
            running[number] = curve, epoch + 1
            if report(number, epoch + 1, curve[epoch]):
                del running[number]
            elif epoch + 1 == len(curve):
                del running[number]
                complete(number)
                if curve[epoch][metric] >= target:
                    return spent
    return spent


def ours(config: Config, curves: Mapping[str, Curve], target: float) -> Spent:
    """Search as the product does."""
    with tempfile.TemporaryDirectory() as folder:
        study = StudyStore(Path(folder), config, optuna.create_study(direction=config.search.direction))

        def ask(running: list[int]) -> tuple[int, dict[str, Any]]:
            asked = study.ask(running, LIMIT)
            assert asked is not None
            return asked

        return play(curves, config.search.metric, target, ask, study.report, study.complete)


def at_random(config: Config, curves: Mapping[str, Curve], target: float) -> Spent:
    """Search with Optuna's random sampler; every trial trains to its end."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(config.seed))

    def ask(_: list[int]) -> tuple[int, dict[str, Any]]:
        trial = study.ask()
        return trial.number, config.search.suggest(trial, flat(config))

    return play(curves, config.search.metric, target, ask, lambda *_: False, lambda _: None)


def run() -> list[Row]:
    """Measure the search; a round is a ratio of medians over SEEDS searches each."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    curves, rows = table(config := settings()), []
    best = sorted((curve[-1][config.search.metric] for curve in curves.values()), reverse=True)
    for top in TOPS:
        target, ratios, searches = best[math.ceil(top * len(best)) - 1], [], []
        for number in range(ROUNDS):
            seeds = [config.model_copy(update={"seed": seed}) for seed in range(number * SEEDS, (number + 1) * SEEDS)]
            searches.append([[search(seeded, curves, target) for seeded in seeds] for search in (ours, at_random)])
            fast, slow = (statistics.median(spent.steps for spent in side) for side in searches[-1])
            ratios.append(slow / fast)
        note = []
        for name, rounds in zip(("ours", "random"), zip(*searches, strict=True), strict=True):
            side = [spent for searched in rounds for spent in searched]
            trials, steps = (statistics.median(getattr(spent, what) for spent in side) for what in ("trials", "steps"))
            note.append(f"{name} {trials:.0f} trials, {steps:.0f} steps")
        name = f"steps to macro-F1 {target:.3f} (top {top:.1%})"
        rows.append(Row(name, "random, full length", ratios, 3.0, note="; ".join(note)))
    return rows
