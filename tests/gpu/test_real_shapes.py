"""Llama-3.2-3B and HuBERT-large with random weights on a GPU: the same labels in bf16 at any batch size, and the memory
of a step. Run with `pytest -m gpu -s tests/gpu`; the same functions run on tiny models everywhere."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.corpus.schema import SAMPLE_RATE
from data.loading.examples import Example
from data.shards.dataset import Shards
from model.config import LossConfig, ModelConfig
from model.evaluation.scoring import label_scores
from model.objectives.losses import answer_losses
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from sweep.preflight.feature_cache import ENCODER_FEATURES
from tests.bench.materials import compute, settings, train_steps, trainer
from tests.conftest import LABELS
from tests.model.common import ANSWERS
from tests.real_shapes import random_weights

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def clips(count: int, longest: float) -> list[Example]:
    """Return dialogues of one to four turns whose last turn has a clip, from 0.2 s to `longest` seconds."""
    rng = np.random.default_rng(7)
    words = "i really want to stop it now and then maybe so".split()
    return [
        Example(
            id=f"c/{index}",
            task="classify",
            conversation="c",
            speaker="client",
            answer=LABELS[index % 3],
            subset=None,
            turns=(*(("therapist", " ".join(rng.choice(words, 9))) for _ in range(index % 4)), ("client", "maybe")),
            audio_turn=index % 4,
            pcm=(rng.standard_normal(int(rng.uniform(0.2, longest) * SAMPLE_RATE)) * 3000).astype("<i2"),
        )
        for index in range(count)
    ]


def build(models: Path, device: str, **changed: Any) -> SpeechLLM:
    seed_everything(0)
    tree: dict[str, Any] = {
        "modality": "text+speech",
        "encoder": {"path": str(models / "hubert-layer"), "dtype": "bfloat16"},
        "llm": {"path": str(models / "llm"), "dtype": "bfloat16"},
        "lora": {"rank": 8, "targets": "all-linear", "dropout": 0.0},
    }
    return SpeechLLM(ModelConfig.model_validate(tree | changed), {"classify": ANSWERS["classify"]}, device)


@torch.no_grad()
def label_agreement(model: SpeechLLM, examples: list[Example], size: int) -> tuple[float, float]:
    """Return the share of examples with the same label alone and in batches, and the share of the commonest label.

    The mean of the scores is subtracted, because with random weights one label would win everywhere.
    """
    model.eval()
    alone = torch.cat([label_scores(model, [example]) for example in examples])
    batched = torch.cat(
        [label_scores(model, examples[start : start + size]) for start in range(0, len(examples), size)]
    )
    expected, found = ((scores_BK - alone.mean(0)).argmax(-1) for scores_BK in (alone, batched))
    commonest = expected.bincount().max().item() / len(examples)
    return (expected == found).float().mean().item(), commonest


def test_tiny_models_choose_the_same_labels_in_bf16(models: Path) -> None:
    agreement, commonest = label_agreement(build(models, "cpu"), clips(40, 0.8), 8)
    assert agreement == 1
    assert commonest < 0.8


@pytest.fixture
def real_shapes(models: Path) -> Iterator[Path]:
    """Models of the real shapes instead of the tiny ones in this folder."""
    with random_weights(models / "llm", models / "hubert-layer"):
        yield models


@pytest.mark.gpu
@needs_gpu
def test_real_shapes_choose_the_same_labels_in_bf16(real_shapes: Path) -> None:
    agreement, commonest = label_agreement(build(real_shapes, "cuda"), clips(200, 15.0), 8)
    print(f"labels alone and in batches of 8: {agreement:.1%} equal, commonest {commonest:.1%}")
    assert agreement >= 0.99
    assert commonest < 0.8


def training_step(model: SpeechLLM, examples: list[Example]) -> tuple[float, float]:
    """Return the seconds of forward and backward over a micro-batch, and the peak memory in GiB."""
    model.train()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    answer_losses(model, examples, LossConfig()).next_token_B.sum().backward()
    torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**30


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("trains_encoder", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_of_the_real_shapes_fits(checkpointing: bool, trains_encoder: bool, real_shapes: Path) -> None:
    encoder = {"path": str(real_shapes / "hubert-layer"), "dtype": "float32" if trains_encoder else "bfloat16"}
    llm = {"path": str(real_shapes / "llm"), "dtype": "bfloat16", "gradient_checkpointing": checkpointing}
    trained = "encoder+adapter+lora+tokens" if trains_encoder else "adapter+lora+tokens"
    model = build(real_shapes, "cuda", encoder=encoder, llm=llm, trainable=trained, precision="bfloat16")
    examples = clips(8, 15.0)
    seconds, memory = [training_step(model, examples) for _ in range(4)][-1]
    print(f"checkpointing {checkpointing}, encoder trains {trains_encoder}: {seconds:.2f} s, {memory:.1f} GiB")
    assert memory < 40


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["on", "off"])
def test_step_waits_for_nothing(packing: str, models: Path, corpus: Shards, tmp_path: Path) -> None:
    """torch raises an error where the host would wait for the device; features come from the cache."""
    paths = {"data.shards": str(corpus.folder), "model.llm.path": str(models / "llm")}
    encoder = {"model.encoder.path": str(models / "hubert-layer"), "train.batch_size": 4, "train.packing": packing}
    config = settings(**paths, **encoder, **{"model.llm.dtype": "bfloat16", "model.precision": "bfloat16"})
    features = compute(ENCODER_FEATURES.requests(config, tmp_path))
    trained = trainer(config, features, device="cuda")
    train_steps(trained, 0, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_steps(trained, 0, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


OPTIONS: dict[str, dict[str, Any]] = {
    "weighted layers": {"encoder": {"layers": "weighted"}, "trainable": "encoder+new"},
    "LoRA on the encoder": {"encoder": {"lora": {"rank": 4, "layers": 1}}},
    "queries over a clip": {"adapter": {"kind": "queries", "queries": 8}},
    "queries in windows": {"adapter": {"kind": "queries", "rate": 10}},
    "merged frames": {"adapter": {"kind": "merge", "rate": 10}},
}


@torch.no_grad()
def clip_difference(models: Path, device: str, changed: dict[str, Any]) -> float:
    """Return the largest relative difference of a clip's embeddings, in a batch against alone, in float32."""
    path = {"path": str(models / "hubert-layer")}
    model = build(models, device, **changed | {"encoder": path | changed.get("encoder", {})}).eval()
    examples = clips(6, 2.0)
    alone = [model.clips([example])[0] for example in examples]
    pairs = zip(model.clips(examples), alone, strict=True)
    return max(float((batched - single).abs().max() / single.abs().max()) for batched, single in pairs)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("option", OPTIONS)
def test_options_do_not_depend_on_the_batch(option: str, models: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert clip_difference(models, "cuda", OPTIONS[option]) <= 1e-5


def test_options_are_compared_on_tiny_models(models: Path) -> None:
    assert clip_difference(models, "cpu", OPTIONS["merged frames"]) <= 1e-5
