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
from tests.bench.frozen import compute, made
from tests.bench.measure import Row
from tests.bench.reading import CACHE

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
    """The demo's models on 440 clips, with the default number of epochs."""
    changed: dict[str, Any] = {
        "data.shards": str(made("search-corpus", make_corpus)),
        "data.history": 0,
        "model.lora.targets": ["q_proj", "v_proj"],
        "train.epochs": 5,
        "search.space": SPACE,
        "search.points": [],
    }
    return resolve(load("demo").with_values(changed))


def make_corpus(folder: Path) -> None:
    """Twelve sessions to learn from, eight to validate."""
    parts = CorpusConfig(split=SplitConfig(fractions=(0.55, 0.36, 0.09)))
    prepare(synthetic.corpus(sessions=22, turns=40), folder, parts)


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
    """The learning curves of all points, by `key`; those that were not trained yet are."""
    path = CACHE / TABLE
    known = dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}
    for point in points():
        if key(point) not in known:
            known[key(point)] = train(config.for_trial(point))
            with path.open("a") as file:
                file.write(json.dumps([key(point), known[key(point)]]) + "\n")
    return known


def key(values: Mapping[str, Any]) -> str:
    """Names the point of the grid that is nearest to a draw."""
    rate = min(RATES, key=lambda own: abs(math.log(own / values[RATE])))
    return json.dumps({**values, RATE: rate}, sort_keys=True)


def train(config: Config) -> Curve:
    """One trial, as `sweep train` trains it."""
    features = None
    if config.model.uses_audio:
        features = compute(ENCODER_FEATURES.request(config, CACHE)).folder
    curve: Curve = []
    model, data = build(config, "local", ("train", "val"), "cpu", CacheFolders(features))
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model, data, config.train, config.tasks, config.seed, Path(folder), lambda _, metrics: curve.append(metrics)
        )
    return curve


@dataclass
class Spent:
    """What a search took until a trial that trained to its end was good enough."""

    trials: int
    epochs: int
    steps: int


Ask = Callable[[list[int]], tuple[int, dict[str, Any]]]
Judge = Callable[[int, int, dict[str, Any]], bool]


def play(
    known: Mapping[str, Curve],
    metric: str,
    target: float,
    ask: Ask,
    report: Judge,
    complete: Callable[[int], None],
) -> Spent:
    """Run trials in SLOTS slots, which take the same time for an epoch, until one has ended at the target.

    Args:
        known: the table.
        metric: as of `search.metric`.
        target: of the metric.
        ask: for number and values of the next trial, given the numbers of those that run.
        report: tells (number, epoch, metrics), and whether the trial ends there.
        complete: tells that a trial has trained to its end.
    """
    running: dict[int, tuple[Curve, int]] = {}
    spent = Spent(0, 0, 0)
    while spent.trials < LIMIT:
        while len(running) < SLOTS:
            number, values = ask(list(running))
            running[number] = known[key(values)], 0
            spent.trials += 1
        for number, (curve, epoch) in list(running.items()):
            spent.epochs += 1
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


def ours(config: Config, known: Mapping[str, Curve], target: float) -> Spent:
    """The product's search."""
    with tempfile.TemporaryDirectory() as folder:
        study = StudyStore(Path(folder), config, optuna.create_study(direction=config.search.direction))

        def ask(busy: list[int]) -> tuple[int, dict[str, Any]]:
            asked = study.ask(busy, LIMIT)
            assert asked is not None
            return asked

        return play(known, config.search.metric, target, ask, study.report, study.complete)


def at_random(config: Config, known: Mapping[str, Curve], target: float) -> Spent:
    """Optuna's random search; every trial trains to its end."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(config.seed))

    def ask(_: list[int]) -> tuple[int, dict[str, Any]]:
        trial = study.ask()
        return trial.number, config.search.suggest(trial, flat(config))

    return play(known, config.search.metric, target, ask, lambda *_: False, lambda _: None)


def run() -> list[Row]:
    """The goal of searching."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = settings()
    known = table(config)
    best = sorted((curve[-1][config.search.metric] for curve in known.values()), reverse=True)
    return [row(config, known, best[math.ceil(top * len(best)) - 1], f"top {top:.1%}") for top in TOPS]


def row(config: Config, known: Mapping[str, Curve], target: float, name: str) -> Row:
    """A round is a ratio of medians over SEEDS searches each."""
    taken: dict[str, list[list[Spent]]] = {"ours": [], "random": []}
    for number in range(ROUNDS):
        seeds = [config.model_copy(update={"seed": seed}) for seed in range(number * SEEDS, (number + 1) * SEEDS)]
        taken["ours"].append([ours(seeded, known, target) for seeded in seeds])
        taken["random"].append([at_random(seeded, known, target) for seeded in seeds])
    ratios = [
        median("steps", slow) / median("steps", fast) for slow, fast in zip(taken["random"], taken["ours"], strict=True)
    ]
    note = "; ".join(
        f"{side} {median('trials', whole):.0f} trials, {median('steps', whole):.0f} steps"
        for side, rounds in taken.items()
        for whole in [list(itertools.chain(*rounds))]
    )
    return Row(f"steps to macro-F1 {target:.3f} ({name})", "random, full length", ratios, 3.0, note=note)


def median(what: str, searches: list[Spent]) -> float:
    """Of several searches."""
    return statistics.median(getattr(one, what) for one in searches)
