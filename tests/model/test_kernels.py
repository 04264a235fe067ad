"""Fused LoRA, compiled layers and other kernels compute what the layers compute without them."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from data.errors import ConfigError
from model.speech_llm.kernels import check_kernels, compile_layers, set_kernels
from model.speech_llm.language_model import load_llm_with_lora
from tests.model.common import close, settings


def adapted(models: Path, **lora: Any) -> Any:
    """Return an LLM whose LoRA layers are no longer zero."""
    llm = load_llm_with_lora(settings(models, lora={"rank": 4, "dropout": 0.0} | lora), "cpu")
    torch.manual_seed(0)
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
            parameter.requires_grad_()
    return llm


def outputs(llm: Any, *shape: int) -> list[Tensor]:
    """Return the logits of a batch [B, T], and the gradients of what trains."""
    torch.manual_seed(1)
    llm.zero_grad()
    inputs = torch.randn(*shape, llm.config.hidden_size, requires_grad=True)
    logits = llm(inputs_embeds=inputs, use_cache=False).logits
    logits.float().square().sum().backward()
    gradients = [parameter.grad for parameter in llm.parameters() if parameter.requires_grad]
    return [logits, inputs.grad, *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize(("dropout", "mixed", "fused"), [(0.3, False, True), (0.0, True, True), (0.0, False, False)])
def test_fused_lora_equals_that_of_peft(dropout: float, mixed: bool, fused: bool, models: Path) -> None:
    """With the same draws of dropout; as exact under autocast; and with DoRA it is PEFT's own forward pass."""
    llm = adapted(models, dropout=dropout, dora=not fused).train()
    layers = [module for module in llm.modules() if isinstance(module, LoraLinear)]
    assert layers
    assert all(("forward" in vars(layer)) == fused for layer in layers)
    mixed_precision = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    with mixed_precision:
        found = outputs(llm, 2, 5)
    for layer in layers:
        vars(layer).pop("forward", None)
    with mixed_precision:
        expected = outputs(llm, 2, 5)
    for first, second, exact in zip(found, expected, outputs(llm, 2, 5), strict=True):
        assert (first - exact).norm() <= max(1e-5 * exact.norm(), 1.5 * (second - exact).norm())


def test_fused_lora_leaves_merging_to_peft(models: Path) -> None:
    llm = adapted(models).eval()
    inputs = torch.randn(1, 4, llm.config.hidden_size)
    before = llm(inputs_embeds=inputs).logits
    llm.merge_adapter()
    assert close(llm(inputs_embeds=inputs).logits, before)
    llm.unmerge_adapter()
    with llm.disable_adapter():
        assert not close(llm(inputs_embeds=inputs).logits, before)


def test_rank_scale_and_length_compile_nothing_again(models: Path) -> None:
    """Compiled layers are counted and then run as they are; one trial after another in the same process."""
    compiled = list[int]()

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(len(inputs))
        return graph.forward

    def trial(*shape: int, **lora: Any) -> int:
        """Return how often something was compiled."""
        before, llm = len(compiled), adapted(models, **lora).train()
        expected = outputs(llm, *shape)
        compile_layers(llm, count)
        assert all(map(close, outputs(llm, *shape), expected))
        with torch.no_grad():
            llm(inputs_embeds=torch.randn(2, 3, llm.config.hidden_size))
        return len(compiled) - before

    first = trial(2, 7)
    assert 0 < first <= 2, "all layers share what is compiled"
    assert trial(3, 11, rank=8, alpha=7) == 0
    assert trial(4, 5, rank=16, rslora=True) == 0
    assert trial(2, 7, targets=["q_proj"]) > 0


@contextlib.contextmanager
def liger(patch: pytest.MonkeyPatch, used: list[str]) -> Iterator[None]:
    """Install kernels that compute on a CPU, by their definitions, and note which are used."""

    def norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        used.append("norm")
        assert (offset, casting, in_place) == (0.0, "llama", False)
        return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        used.append("gated")
        return torch.nn.functional.silu(gate) * up

    found = importlib.util.find_spec
    kernels = {"rms_norm": ("LigerRMSNormFunction", norm), "swiglu": ("LigerSiLUMulFunction", gated)}
    for module, (name, apply) in kernels.items():
        stand_in = ModuleType(module)
        setattr(stand_in, name, SimpleNamespace(apply=apply))
        patch.setitem(sys.modules, f"liger_kernel.ops.{module}", stand_in)
    patch.setattr(importlib.util, "find_spec", lambda name: object() if name == "liger_kernel" else found(name))
    yield


def test_liger_replaces_norms_and_gated_layers_of_a_view(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here, so its kernels are replaced by their definitions."""
    used = list[str]()
    llm = adapted(models)
    expected = outputs(llm, 2, 5)
    with liger(monkeypatch, used), monkeypatch.context() as patch:
        patch.setattr("model.speech_llm.kernels.check_kernels", lambda *_: None)
        set_kernels(llm, "liger")
        assert all(map(close, outputs(llm, 2, 5), expected))
    layers = llm.config.num_hidden_layers
    assert (used.count("norm"), used.count("gated")) == (2 * layers + 1, layers)
    used.clear()
    outputs(adapted(models), 2, 5)
    assert not used, "the base model is unchanged"


def test_kernels_that_cannot_run_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = adapted(models)
    check_kernels(llm, "torch", "cpu")
    with pytest.raises(ConfigError, match=r"^train\.kernels: liger needs liger-kernel, which is not installed; pip"):
        check_kernels(llm, "liger", "cuda")
    with liger(monkeypatch, []):
        check_kernels(llm, "liger", "cuda")
        with pytest.raises(ConfigError, match=r"^train\.kernels: liger needs a GPU; .* or set torch$"):
            check_kernels(llm, "liger", "cpu")
        monkeypatch.setattr("model.speech_llm.kernels.NORMS", {"OtherNorm"})
        with pytest.raises(ConfigError, match="this LLM is a llama model"):
            check_kernels(llm, "liger", "cuda")
