"""Faster decoder layers: LoRA without extra passes over the activations, compiled layers, and the kernels of Liger.

They change the layers of one view of an LLM, so the next trial in the process starts from unchanged ones. Results stay
the same up to the rounding of another order of operations.

Shapes: P positions of all sequences, E width of a linear layer's input, O of its output, R rank.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Literal

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from data.errors import ConfigError
from model.compat import ADAPTER, compile_for_any_size, mark_dynamic

BACKEND = "inductor"
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # whose layers the kernels of Liger compute as they are
NORMS, GATED = ({f"{family}{kind}" for family in FAMILIES} for kind in ("RMSNorm", "MLP"))
# Dimensions of a layer's arguments that differ from batch to batch, by their number: of positions [B, T], hidden states
# and rotations [B, T, E], and masks [B, 1, T, T].
DYNAMIC = {0: (), 1: (0,), 2: (0, 1), 3: (0, 1), 4: (0, 2, 3)}


def fuse_lora(llm: PreTrainedModel) -> None:
    """Let linear layers add the low-rank update to their product where that is computed (see `_fused_forward`).

    DoRA, experts, quantised layers and convolutions keep PEFT's forward pass.
    """
    for module in llm.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear and not module.lora_variant:
            scale = torch.full((), module.scaling[ADAPTER], device=module.lora_A[ADAPTER].weight.device)
            module.register_buffer("scale", scale, persistent=False)  # a tensor: another value compiles nothing again
            module.forward = MethodType(_fused_forward, module)


def _fused_forward(self: LoraLinear, x: Tensor, *args: object, **options: object) -> Tensor:
    """Return W x + s B A x as one product that is added to the other in place (Hu et al., 2021, equation 3).

    PEFT writes the update, scales it and adds it, each in a pass of its own over [P, O].
    """
    weight_RE, weight_OR = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
    device = x.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    fits = mixed or x.dtype == weight_RE.dtype == self.base_layer.weight.dtype
    if not fits or args or options or self.disable_adapters or self.merged:
        output: Tensor = LoraLinear.forward(self, x, *args, **options)
        return output
    rows_PE = x.flatten(0, -2)
    sum_PO: Tensor = self.base_layer(rows_PE)
    update_PR = nn.functional.linear(self.lora_dropout[ADAPTER](rows_PE), weight_RE) * self.scale
    sum_PO.addmm_(update_PR, weight_OR.T.to(sum_PO.dtype))
    return sum_PO.view(*x.shape[:-1], -1)


def set_kernels(llm: PreTrainedModel, kernels: Literal["torch", "liger"]) -> None:
    """Let norms and gated feed-forward layers of a view compute with the kernels of Liger, or as they are.

    Raises:
        ConfigError: see `check_kernels`.
    """
    check_kernels(llm, kernels, llm.get_input_embeddings().weight.device.type)
    if kernels == "torch":
        return
    for module in llm.modules():
        name = type(module).__name__
        if name in NORMS:
            module.forward = MethodType(_liger_norm, module)
        elif name in GATED:
            module.forward = MethodType(_liger_gated, module)


def check_kernels(llm: PreTrainedModel, kernels: Literal["torch", "liger"], device: str) -> None:
    """Refuse kernels that cannot run.

    Raises:
        ConfigError: liger-kernel is not installed, has no kernels for the LLM's layers, or there is no GPU.
    """
    if kernels == "torch":
        return
    problem = ""
    if importlib.util.find_spec("liger_kernel") is None:
        problem = "needs liger-kernel, which is not installed; pip install 'speech-llm-sweep[liger]'"
    elif device == "cpu":
        problem = "needs a GPU; set resources.gpus_per_worker"
    elif not any(type(module).__name__ in NORMS for module in llm.modules()):
        families, kind = ", ".join(FAMILIES), llm.config.model_type
        problem = f"replaces the norms of {families}, and this LLM is a {kind} model; use one of these"
    if problem:
        raise ConfigError(f"train.kernels: liger {problem}, or set torch")


def _liger_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    normed: Tensor = LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)
    return normed


def _liger_gated(self: nn.Module, x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up, down = map(self.get_submodule, ("gate_proj", "up_proj", "down_proj"))
    output: Tensor = down(LigerSiLUMulFunction.apply(gate(x), up(x)))
    return output


def compile_layers(llm: PreTrainedModel, backend: str = BACKEND) -> None:
    """Let the decoder layers of a view run compiled in training; the first steps compile, once for all layers.

    What is compiled stays in the process. Another length, batch, learning rate, rank or scale of LoRA compiles nothing
    again. These do: a batch of one, other sizes of the base model, whether LoRA has dropout, which layers it adapts,
    mixed precision, and a first layer whose input needs no gradient. Evaluation is not compiled.
    """
    for module in llm.modules():
        if isinstance(module, LoraLinear):
            mark_dynamic(module.lora_A[ADAPTER].weight, 0)
            mark_dynamic(module.lora_B[ADAPTER].weight, 1)
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = MethodType(_compiled_in_training(type(module).forward, backend), module)


@functools.cache
def _compiled_in_training(forward: Callable[..., object], backend: str) -> Callable[..., object]:
    compiled = compile_for_any_size(forward, backend)

    @functools.wraps(forward)
    def call(layer: nn.Module, *args: object, **options: object) -> object:
        if not torch.is_grad_enabled():
            return forward(layer, *args, **options)
        for tensor in _tensors((args, options)):
            mark_dynamic(tensor, *DYNAMIC[tensor.ndim])
        return compiled(layer, *args, **options)

    return call


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
