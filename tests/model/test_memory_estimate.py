"""The estimated memory of a step, against the tensors that a step makes, and the page that is made from it.

A backward pass without values starts threads of autograd, after which a process cannot be forked any more, as other
tests do: so each has a process of its own, a new one, since a fork of a process with threads of torch may abort.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.objectives.losses import student_outputs
from model.speech_llm.language_model import load_llm_with_lora
from model.speech_llm.prompt import Answer
from model.training.memory_estimate import PREDICTED, LiveBytes, step_memory, weight_memory
from tests.bench import fits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM of five layers whose scores of attention would take much of the memory of a step, if they were kept."""
    folder = tmp_path_factory.mktemp("llama")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=5, **sizes)).save_pretrained(folder)
    return folder


def settings(path: Path, checkpointing: bool | int, precision: str = "float32", dtype: str = "float32") -> ModelConfig:
    llm = {"path": str(path), "gradient_checkpointing": checkpointing, "dtype": dtype}
    lora = {"rank": 2, "targets": "all-linear", "dropout": 0.1}
    return ModelConfig.model_validate({"llm": llm, "precision": precision, "lora": lora})


def estimated(config: ModelConfig, length: int) -> int:
    """Return the estimated bytes of the same, in a process of its own."""
    llm = load_llm_with_lora(config, "meta")
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return step_memory(llm, config, [length])


def made(config: ModelConfig, length: int) -> int:
    """Return the bytes of the tensors that a step over a sequence makes, at the peak."""
    llm = load_llm_with_lora(config, "cpu").train()
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    embedding = llm.get_input_embeddings().weight
    row = torch.zeros(length, embedding.shape[1], dtype=embedding.dtype, requires_grad=True)
    live = LiveBytes([*llm.parameters(), *llm.buffers(), row])
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            predicted = Answer((0,) * PREDICTED, (0,) * PREDICTED)
            loss = student_outputs(llm, [row], [predicted], hidden=False).logits_PV.logsumexp(-1).sum()
        loss.backward()
    return live.peak


@pytest.mark.parametrize(
    ("checkpointing", "precision", "dtype"),
    [
        (2, "bfloat16", "bfloat16"),
        pytest.param(False, "float32", "float32", marks=pytest.mark.long),
        pytest.param(True, "float32", "bfloat16", marks=pytest.mark.long),
        pytest.param(False, "bfloat16", "float32", marks=pytest.mark.long),
        pytest.param(False, "bfloat16", "bfloat16", marks=pytest.mark.long),
    ],
)
def test_estimate_is_what_a_step_takes(checkpointing: bool | int, precision: str, dtype: str, llama: Path) -> None:
    """From steps over two and three layers of a kind, without values."""
    config = settings(llama, checkpointing, precision, dtype)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        estimate = process.submit(estimated, config, 300).result()
    assert estimate == pytest.approx(made(config, 300), rel=0.04)


def test_weights_are_counted_as_they_are_stored(llama: Path) -> None:
    llm = load_llm_with_lora(settings(llama, False), "meta")
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    layer, embeddings, norms = 4 * 64 * 64 + 3 * 64 * 128, 2 * 100 * 64, 11 * 64
    lora = 5 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    whole = weight_memory(llm, llm, "none")
    assert (whole.frozen, whole.trained, whole.converted) == (4 * (5 * layer + embeddings + norms), 12 * lora, 0)
    divided = weight_memory(llm, llm, "none", workers=2)
    assert divided.frozen == 4 * ((5 * layer + 10 * 64) // 2 + embeddings + 64)
    assert divided.converted == 2 * 4 * (layer + 2 * 64)
    stored = {load_in: weight_memory(llm, llm, load_in) for load_in in ("8bit", "4bit")}
    assert stored["8bit"].frozen == 5 * layer + 4 * (embeddings + norms)
    assert stored["4bit"].frozen == pytest.approx(0.516 * 5 * layer + 4 * (embeddings + norms), rel=1e-3)
    assert stored["4bit"].converted == 4 * 64 * 128
    assert all(replace(one, step=3).total == one.total + 3 for one in stored.values())


@pytest.mark.long
def test_page_is_what_is_computed() -> None:
    """Of the smallest base; `python -m tests.bench.fits docs/gpu.md` writes all."""
    name, *others = fits.SHAPES
    text = PAGE.read_text(encoding="utf-8")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        lines = process.submit(fits.lines, name).result()
    assert [line for line in lines if line not in text] == []
    assert all(text.count(f"| {other} |") == len(fits.WAYS[other]) for other in others)
