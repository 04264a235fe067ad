"""On a GPU: the training step of the real shapes, Llama-3.2-3B and HuBERT-large (random weights, bf16, LoRA on all
linear layers), against the rate at which the chip multiplies matrices.

    python -m tests.bench gpu

Operations are counted as torch counts them (`FlopCounterMode`): those of the step as it runs, padding included, and
nothing of a recomputation, which this step does not have. Sound is read as features, or encoded online.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2FeatureExtractor

from data.loading.batching import plan
from model.tiny import tiny_tokenizer
from model.training.trainer import Trainer
from sweep.preflight.feature_cache import ENCODER_FEATURES
from tests.bench.materials import CACHE, compute, format_equal, made, settings, train_steps, trainer
from tests.bench.measure import Row
from tests.real_shapes import random_weights

SIDE, ROUNDS, STEPS = 8192, 5, 3  # of the matrices; steps of a round
DEVICE = "cuda"


GOALS = {"features from files": 0.45, "encoder online": None}


def run() -> list[Row]:
    """Measure both; no row has a figure where there is no GPU."""
    if not torch.cuda.is_available():
        return [Row(f"step of the real shapes, {name}", "the chip's matrix rate", note="no GPU") for name in GOALS]
    # The weights are random and made on the device: the folders hold a tokenizer and a feature extractor alone.
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    llm, encoder = (
        made("tokenizer-alone", tiny_tokenizer().save_pretrained),
        made("extractor-alone", extractor.save_pretrained),
    )
    with random_weights(llm, encoder, DEVICE):
        return rows(llm, encoder)


def rows(llm: Path, encoder: Path) -> list[Row]:
    """A row each for features from files and for the encoder online."""
    config = settings(
        **{
            "model.llm": {"path": str(llm), "dtype": "bfloat16", "max_text_tokens": 512},
            "model.encoder.path": str(encoder),
            "model.encoder.dtype": "bfloat16",
            "model.precision": "bfloat16",
            "model.lora.targets": "all-linear",
            "train.batch_size": 32,
            "resources.gpus_per_worker": 1,
        }
    )
    started = time.monotonic()
    requests = ENCODER_FEATURES.requests(config, CACHE)
    folders = compute(requests)
    size = ENCODER_FEATURES.format_size(sum(file.size for file in requests[0].files))
    computed = f"feature cache: {size} in {time.monotonic() - started:.0f} s"
    trainers = [trainer(config, features, device=DEVICE) for features in (folders, ())]
    taken = [measure(trained) for trained in trainers]
    notes = [computed, format_equal(*trainers, (ROUNDS + 1) * STEPS)]
    rate = matrix_rate()
    return [
        row(name, trained, seconds, peak, rate, note)
        for name, trained, (seconds, peak), note in zip(GOALS, trainers, taken, notes, strict=True)
    ]


def row(name: str, trained: Trainer, seconds: list[float], peak: float, rate: float, note: str) -> Row:
    """Return the share of the rate. The counter of operations knows no attention whose heads share keys, but it knows
    the products that this consists of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_steps(trained, 0, STEPS)
    done, median = counter.get_total_flops(), statistics.median(seconds)
    steps = plan(trained.train.costs, batch_size=trained.config.batch_size, seed=0, epoch=0)[:STEPS]
    positions = sum(trained.train.costs[position].tokens for step in steps for position in step)
    text = f"{positions / median:,.0f} positions/s, {done / median / 1e12:.0f} of {rate / 1e12:.0f} TFLOP/s, "
    text += f"{median / STEPS:.2f} s and {positions / STEPS:.0f} positions a step, {peak:.0f} GiB; {note}"
    shares = [done / taken / rate for taken in seconds]
    return Row(f"step of the real shapes, {name}", "the chip's matrix rate", shares, GOALS[name], note=text)


def matrix_rate() -> float:
    """Return the operations a second of a product of two large bf16 matrices."""
    left, right = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    taken = [clocked(lambda: [left @ right for _ in range(10)]) / 10 for _ in range(ROUNDS + 1)]
    return 2 * SIDE**3 / statistics.median(taken[1:])


def clocked(work: Callable[[], object]) -> float:
    """Return the seconds until the device has done some work."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(trained: Trainer) -> tuple[list[float], float]:
    """Return the seconds of rounds, and the peak of memory in GiB."""
    torch.cuda.reset_peak_memory_stats()
    seconds = [clocked(lambda: train_steps(trained, 0, STEPS)) for _ in range(ROUNDS + 1)]
    return seconds[1:], torch.cuda.max_memory_allocated() / 2**30
