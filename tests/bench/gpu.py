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
from tests.bench.frozen import compute, made, said_equal, settings, trainer
from tests.bench.measure import Row
from tests.bench.reading import CACHE
from tests.real_shapes import random_weights

SIDE, ROUNDS, STEPS = 8192, 5, 3  # of the matrices; steps of a round
DEVICE = "cuda"


def run() -> list[Row]:
    """No row has a figure where there is no GPU."""
    if not torch.cuda.is_available():
        return [Row(f"step of the real shapes, {name}", "the chip's matrix rate", note="no GPU") for name in GOALS]
    llm, encoder = made("tokenizer-alone", make_tokenizer), made("extractor-alone", make_extractor)
    with random_weights(llm, encoder, DEVICE):
        return rows(llm, encoder)


GOALS = {"features from files": 0.45, "encoder online": None}


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
    request = compute(ENCODER_FEATURES.request(config, CACHE))
    size = ENCODER_FEATURES.format_size(sum(file.size for file in request.files))
    passed = f"feature cache: {size} in {time.monotonic() - started:.0f} s"
    trainers = [trainer(config, features, device=DEVICE) for features in (request.folder, None)]
    taken = [measure(own) for own in trainers]
    notes = [passed, said_equal(*trainers, (ROUNDS + 1) * STEPS)]
    rate = matrix_rate()
    return [
        row(name, own, seconds, peak, rate, note)
        for name, own, (seconds, peak), note in zip(GOALS, trainers, taken, notes, strict=True)
    ]


def row(name: str, own: Trainer, seconds: list[float], peak: float, rate: float, note: str) -> Row:
    """The share of the rate, and what else there is to say."""
    done, middle = operations(own), statistics.median(seconds)
    positions = sum(own.train.costs[position].tokens for step in first_steps(own) for position in step)
    said = f"{positions / middle:,.0f} positions/s, {done / middle / 1e12:.0f} of {rate / 1e12:.0f} TFLOP/s, "
    said += f"{middle / STEPS:.2f} s and {positions / STEPS:.0f} positions a step, {peak:.0f} GiB; {note}"
    shares = [done / taken / rate for taken in seconds]
    return Row(f"step of the real shapes, {name}", "the chip's matrix rate", shares, GOALS[name], note=said)


def matrix_rate() -> float:
    """Operations a second of a product of two large bf16 matrices."""
    one, other = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    taken = [clocked(lambda: [one @ other for _ in range(10)]) / 10 for _ in range(ROUNDS + 1)]
    return 2 * SIDE**3 / statistics.median(taken[1:])


def clocked(work: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(own: Trainer) -> tuple[list[float], float]:
    """Seconds of rounds, and the most memory that was held, in GiB."""
    torch.cuda.reset_peak_memory_stats()
    own.model.train()
    seconds = [clocked(lambda: train(own)) for _ in range(ROUNDS + 1)]
    return seconds[1:], torch.cuda.max_memory_allocated() / 2**30


def operations(own: Trainer) -> int:
    """Of a round. The counter knows no attention whose heads share keys, but the products that it consists of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        train(own)
    return count.get_total_flops()


def first_steps(own: Trainer) -> list[list[int]]:
    """Those of a round."""
    return plan(own.train.costs, batch_size=own.config.batch_size, seed=0, epoch=0)[:STEPS]


def train(own: Trainer) -> None:
    """A round, with what is read for it."""
    steps = first_steps(own)
    for step, examples in zip(steps, own.data.read("train", steps), strict=True):
        own.optimizer_step(step, step, examples)


def make_tokenizer(folder: Path) -> None:
    """The LLM has random weights, which are made on the device."""
    tiny_tokenizer().save_pretrained(folder)


def make_extractor(folder: Path) -> None:
    """So has the encoder."""
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)
