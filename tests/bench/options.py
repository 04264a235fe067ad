"""What heard layers, LoRA on the encoder and each adapter cost: step time and peak memory against the default.

    python -m tests.bench options --record

An encoder of HuBERT-base's size and an LLM of 20 million parameters, 4 clips a step. The default reads the pooled
output of the frozen encoder from the cache. Every variant has a process of its own for its memory; the steps are timed
in turns.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from model.runtime.memory import Peak
from sweep.config.schema import Config
from sweep.preflight.feature_cache import ENCODER_FEATURES
from tests.bench.materials import CACHE, compute, epoch_starts, settings, train_steps, trainer
from tests.bench.measure import Row, in_turns, ratios
from tests.forked import Forked

ROUNDS = 7
DEFAULT = "default: last layer, pooled, from the cache"
LAYERS: dict[str, Any] = {"layer 6": 6, "layers 6 and 12 side by side": [6, 12], "weighted sum of all 13": "weighted"}
CACHED = 1.05  # goal: a step that reads other layers from the cache
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    **{f"{name}, from the cache": {"model.encoder.layers": layers} for name, layers in LAYERS.items()},
    "LoRA on the upper 2 of 12 encoder layers": {"model.encoder.lora.rank": 8, "model.encoder.lora.layers": 2},
    "LoRA on all 12 encoder layers": {"model.encoder.lora.rank": 8},
    "adapter: stacked frames": {"model.adapter.kind": "stack"},
    "adapter: convolution": {"model.adapter.kind": "conv"},
    "adapter: 32 queries for a clip": {"model.adapter.kind": "queries", "model.adapter.queries": 32},
    "adapter: 12.5 queries a second": {"model.adapter.kind": "queries"},
    "adapter: merged frames, 12.5 a second": {"model.adapter.kind": "merge"},
}


def run() -> list[Row]:
    """Return how many times the default's CPU time each variant takes, with its peak memory."""
    torch.set_num_threads(1)
    configs = variants()
    cache(configs)
    return compare(configs, lambda name: CACHED if name.endswith("from the cache") else None)


def variants(**changed: Any) -> dict[str, Config]:
    """Return the configurations by name, the default first."""
    given = {"data.history": 3, "train.batch_size": 4} | changed
    return {name: settings(**given | own) for name, own in VARIANTS.items()}


def cache(configs: Mapping[str, Config]) -> None:
    """Compute the encoder outputs that trials read."""
    requests = [request for config in configs.values() for request in ENCODER_FEATURES.requests(config, CACHE)]
    for request in {request.folder: request for request in requests}.values():
        compute([request])


def compare(configs: Mapping[str, Config], goal: Callable[[str], float | None] = lambda name: None) -> list[Row]:
    """Return how many times the CPU time of the first configuration each other one takes for a step, and its memory.

    Args:
        configs: by name.
        goal: returns the largest ratio that a variant should have.
    """
    default = next(iter(configs))
    peaks = {name: Forked(lambda config=config: peak(config)).result() for name, config in configs.items()}
    steps = {name: epoch_starts(trainer(config, features(config)), 1) for name, config in configs.items()}
    taken = in_turns(steps, ROUNDS)
    rows = []
    for name, costs in itertools.islice(taken.items(), 1, None):
        milliseconds = 1000 * statistics.median(cost.cpu for cost in costs)
        memory = f"peak {peaks[name] / 1e6:,.0f} MB, {peaks[name] / peaks[default]:.2f} times the default's"
        runs = ratios(costs, taken[default])
        rows.append(Row(name, "the default", runs, goal(name), most=True, note=f"{milliseconds:,.0f} ms; {memory}"))
    return rows


def features(config: Config) -> list[Any]:
    """Return the folders with the features that a trial reads."""
    return [request.folder for request in ENCODER_FEATURES.requests(config, CACHE)]


def peak(config: Config) -> int:
    """Return the peak memory in bytes of a worker that takes two steps."""
    measured = Peak("cpu")
    train_steps(trainer(config, features(config)), 0, 2)
    return measured.read()
