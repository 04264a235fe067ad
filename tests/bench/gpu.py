"""On a GPU: the training step of the real shapes, Llama-3.2-3B and HuBERT-large (random weights, bf16, LoRA on all
linear layers), against the rate at which the chip multiplies matrices.

    make gpu                       # everything: these rows, a profile, the GPU tests and a sweep (`tests.bench.on_gpu`)
    python -m tests.bench gpu      # these rows

Audio is read as cached features, or encoded online. Each variant changes one setting of the first one.
"""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from transformers import Wav2Vec2FeatureExtractor

from data.corpus.schema import SAMPLE_RATE
from data.errors import UserError
from data.loading.batching import plan
from model.runtime import memory
from model.tiny import tiny_tokenizer
from model.training.dry_run import measure as dry_run
from model.training.trainer import Trainer
from sweep.config.schema import Config
from sweep.execution.trial import build
from sweep.preflight.dry_run import MEMORY_MARGIN
from sweep.preflight.feature_cache import ENCODER_FEATURES
from tests.bench.hardware import clocked, count_operations, matrix_product
from tests.bench.materials import CACHE, compute, made, settings, train_steps, trainer
from tests.bench.measure import Row
from tests.real_shapes import random_weights

RATE, FIRST, ABSENT = "the chip's matrix rate", "cached features", "not measured: no GPU"
# What is changed, and the goal for its share of the matrix rate.
VARIANTS: dict[str, tuple[dict[str, Any], float | None]] = {
    FIRST: ({}, 0.45),
    "encoder online": ({}, 0.40),
    "padded": ({"train.packing": "off"}, None),
    "compiled": ({"train.compile": "on"}, None),
    "4-bit base": ({"model.llm.load_in": "4bit"}, None),
    "kernels of Liger": ({"train.kernels": "liger"}, None),
}
# Goals for the seconds of a variant against those of the first one, and whether each is an upper bound.
COMPARED = {
    "padded": (1.0, False),
    "compiled": (None, True),
    "4-bit base": (1.3, True),
    "kernels of Liger": (None, True),
}


@dataclass(frozen=True)
class Scale:
    """What is measured: the real shapes on a GPU, or tiny ones on a CPU, for the tests."""

    device: str = "cuda"
    side: int = 8192  # of the matrices
    steps: int = 3  # of a round
    rounds: int = 4
    settings: dict[str, Any] = field(
        default_factory=lambda: {
            "model.llm.dtype": "bfloat16",
            "model.encoder.dtype": "bfloat16",
            "model.precision": "bfloat16",
            "model.lora.targets": "all-linear",
            "train.batch_size": 32,
            "resources.gpus_per_worker": 1,
        }
    )


@dataclass
class Taken:
    """What the steps of a variant took."""

    seconds: list[float]  # of each round
    gigabytes: float  # at most


def run() -> list[Row]:
    """Measure all variants; no row has a figure where there is no GPU."""
    if not torch.cuda.is_available():
        return [
            *(Row(f"step, {name}", RATE, goal=goal, note=ABSENT) for name, (_, goal) in VARIANTS.items()),
            *(Row(f"seconds of a step, {name}", FIRST, [], *goal, ABSENT) for name, goal in COMPARED.items()),
            Row("memory, 4-bit base", FIRST, [], 0.4, most=True, note=ABSENT),
        ]
    with real_shapes() as (llm, encoder):
        return list(figures(Scale(), llm, encoder))


@contextlib.contextmanager
def real_shapes() -> Iterator[tuple[Path, Path]]:
    """Yield the folders of the LLM and the encoder, which hold a tokenizer and a feature extractor alone.

    The weights are random and made on the device.
    """
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    llm = made("tokenizer-alone", tiny_tokenizer().save_pretrained)
    encoder = made("extractor-alone", extractor.save_pretrained)
    with random_weights(llm, encoder):
        yield llm, encoder


def figures(scale: Scale, llm: Path, encoder: Path) -> Iterator[Row]:
    """Yield each row as soon as it is measured."""
    paths = {"model.llm.path": str(llm), "model.encoder.path": str(encoder)}
    config = settings(**scale.settings, **paths)
    request, *_ = ENCODER_FEATURES.requests(config, CACHE)
    rmtree(request.folder, ignore_errors=True)
    [request, *_] = ENCODER_FEATURES.requests(config, CACHE)
    taken = clocked(lambda: compute([request]), scale.device).wall
    seconds = sum(file.size for file in request.files) / SAMPLE_RATE
    yield Row("feature cache, clip by clip", "real time", [seconds / taken], note=f"{seconds:.0f} s of audio")
    dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
    product = matrix_product(scale.side, dtype, scale.device)
    products = [
        clocked(lambda: [product() for _ in range(10)], scale.device).wall / 10 for _ in range(scale.rounds + 1)
    ]
    rate = 2 * scale.side**3 / statistics.median(products[1:])
    yield Row("matrix products", "TFLOP/s", [rate / 1e12])
    yield budget_row(scale, config)
    first: Taken | None = None
    for name, (changed, goal) in VARIANTS.items():
        row = Row(f"step, {name}", RATE, goal=goal)
        try:
            features = () if name == "encoder online" else (request.folder,)
            trained = trainer(config.with_values(changed), features, device=scale.device)
            steps = time_steps(trained, scale)
        except UserError as error:  # a package is not installed, or the device cannot
            row.note = str(error)
            yield row
            continue
        row.runs, row.note = shares(trained, scale, steps, rate)
        yield row
        first = first or steps
        if name in COMPARED:
            yield from compared(name, steps, first)
        del trained
        memory.free()


def time_steps(trained: Trainer, scale: Scale) -> Taken:
    """Return what rounds of steps take; the first one is not counted, since it compiles and fills caches."""
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    costs = [clocked(lambda: train_steps(trained, 0, scale.steps), scale.device) for _ in range(scale.rounds + 1)]
    most = torch.cuda.max_memory_allocated() if scale.device == "cuda" else 0
    return Taken([cost.wall for cost in costs[1:]], most / 2**30)


def shares(trained: Trainer, scale: Scale, steps: Taken, rate: float) -> tuple[list[float], str]:
    """Return the shares of the matrix rate, and a note."""
    operations, median = count_operations(trained, scale.steps), statistics.median(steps.seconds)
    planned = plan(trained.train.costs, batch_size=trained.config.batch_size, seed=0, epoch=0)[: scale.steps]
    positions = sum(trained.train.costs[position].tokens for step in planned for position in step)
    text = f"{positions / median:,.0f} positions/s, {operations / median / 1e12:.3g} TFLOP/s, "
    text += (
        f"{median / scale.steps:.2f} s and {positions / scale.steps:.0f} positions a step, {steps.gigabytes:.1f} GiB"
    )
    return [operations / seconds / rate for seconds in steps.seconds], text


def compared(name: str, steps: Taken, first: Taken) -> Iterator[Row]:
    """Yield how a variant compares with the first one."""
    goal, is_most = COMPARED[name]
    ratios = [seconds / statistics.median(first.seconds) for seconds in steps.seconds]
    yield Row(f"seconds of a step, {name}", FIRST, ratios, goal, is_most)
    if name == "4-bit base" and first.gigabytes:
        yield Row(f"memory, {name}", FIRST, [steps.gigabytes / first.gigabytes], 0.4, most=True)


def budget_row(scale: Scale, config: Config) -> Row:
    """Return the token budget that a dry run finds, and what it takes of the device's memory."""
    capacity, peak = memory.capacity(scale.device), memory.Peak(scale.device)
    model, data = build(config, "local", ("train", "val"), scale.device)
    limit = int((1 - MEMORY_MARGIN) * capacity)
    cost = dry_run(model, data, config.train, config.tasks, 0, 1, peak, max_bytes=limit)
    note = f"{cost.full_bytes / 2**30:.1f} of {capacity / 2**30:.0f} GiB"
    return Row("token budget found", "tokens and frames", [float(cost.token_budget)], note=note)


def profile(trained: Trainer, device: str) -> dict[str, Any]:
    """Return which kernels the time of a step is spent in, and how much of the step the device computes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    train_steps(trained, 0, 1)
    with profiled(activities=[activity]) as recorded:
        wall = clocked(lambda: train_steps(trained, 0, 1), device).wall
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1
    return {
        "seconds": wall,
        "share_of_time_in_kernels": total / 1e6 / wall,
        "kernels": [
            {"name": event.key[:120], "share": round(getattr(event, key) / total, 4), "calls": event.count}
            for event in events[:30]
        ],
    }
