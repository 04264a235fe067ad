"""Quantized base models, `model.llm.load_in`: bitsandbytes stores the weights of linear layers in 8 or 4 bits.

Only the storage is quantized. A layer converts its weights to the type of its input, multiplies, and drops them. The
products of bitsandbytes itself would depend on the batch: LLM.int8() (arXiv 2208.07339) chooses the columns that it
computes in half precision by the activations of all positions, and other kernels serve few positions than many.
"""

import copy
import logging
from collections.abc import Collection, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from data.errors import ConfigError, UnavailableError
from model.config import LoadIn
from model.parts import part_of

WEIGHTS = ("Params4bit", "Int8Params")  # classes of bitsandbytes
MOST_INT8 = 127


def quantization_config(load_in: LoadIn, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings with which transformers quantizes weights while it reads them.

    Raises:
        UnavailableError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UnavailableError(
            f"model.llm.load_in: {load_in} needs bitsandbytes, which is not installed; install it with: "
            "pip install 'speech-llm-sweep[quantized]', or set none"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not used
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_frozen(load_in: LoadIn, names: Collection[str]) -> None:
    """Refuse to train or to load weights of a quantized LLM itself.

    Args:
        load_in: how its weights are stored.
        names: of the parameters of a SpeechLLM that train or are loaded.

    Raises:
        ConfigError: names one of them.
    """
    own = [name for name in names if part_of(name) == "llm"]
    if load_in != "none" and own:
        raise ConfigError(
            f"model.llm.load_in: {load_in} is for an LLM whose weights stay as they were published, and "
            f"model.trainable or model.init_from names {min(own)}; set none, or leave it out"
        )


def is_quantized(module: nn.Module) -> bool:
    """Return whether a layer stores quantized weights."""
    return type(getattr(module, "weight", None)).__name__ in WEIGHTS


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers with quantized weights, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(module):
            yield name, module


def dequantized(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return the weights that a quantized layer stores, [outputs, inputs], in a type."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Int8Params, Params4bit

    weight = layer.weight
    if isinstance(weight, Int8Params):
        return Tensor.mul_(weight.detach().to(dtype, copy=True), weight.SCB[:, None] / MOST_INT8)
    assert isinstance(weight, Params4bit)
    state = copy.copy(weight.quant_state)
    # In one row: on a CPU, bitsandbytes 0.50.2 begins a block of 64 weights with each row, also where they are shorter.
    state.dtype, shape, state.shape = dtype, state.shape, torch.Size((1, state.shape.numel()))
    return Tensor.reshape(dequantize_4bit(weight.detach(), state), shape)


class Product(torch.autograd.Function):
    """The product of inputs with the weights of a quantized layer, which are converted again in the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, inputs: Tensor, layer: nn.Linear) -> Tensor:
        """Return the product with the bias."""
        ctx.layer = layer  # type: ignore[attr-defined]
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        return F.linear(inputs, dequantized(layer, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the inputs."""
        [gradient] = gradients
        layer: nn.Linear = ctx.layer  # type: ignore[attr-defined]
        return gradient @ dequantized(layer, gradient.dtype), None


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    device = inputs.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
    product: Tensor = Product.apply(inputs.to(dtype), layer)
    return product


def use_own_products(llm: PreTrainedModel) -> None:
    """Let all quantized layers compute as the module says. PEFT knows their classes, and so these are derived."""
    kinds = {type(layer).__name__: type(layer) for _, layer in quantized_layers(llm)}
    own = {name: type(name, (kind,), {"forward": _forward}) for name, kind in kinds.items()}
    for _, layer in quantized_layers(llm):
        layer.__class__ = own[type(layer).__name__]


def shared_weights(module: nn.Module) -> dict[int, object]:
    """Return what copies of a model share of its quantized weights, by id: `copy.deepcopy` takes it as its memo."""
    weights = [layer.weight for _, layer in quantized_layers(module)]
    states = [state for weight in weights if (state := getattr(weight, "quant_state", None)) is not None]
    return {id(thing): thing for thing in (*weights, *states)}


def dequantize(llm: PreTrainedModel) -> None:
    """Replace quantized layers by plain ones with the weights that they store, also below LoRA layers.

    LoRA can be merged into these without another rounding: merging into quantized weights would quantize the sum.
    """
    from peft.tuners.lora import Linear, LoraLayer

    for module in list(llm.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear) or not is_quantized(child):
                continue
            dense = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(dequantized(child, llm.dtype), requires_grad=False)
            dense.bias = child.bias
            setattr(module, name, dense)
            if isinstance(module, LoraLayer):
                module.__class__ = Linear
    for part in (llm, getattr(llm, "base_model", llm)):
        if hasattr(part.config, "quantization_config"):
            del part.config.quantization_config
