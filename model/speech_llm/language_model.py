"""The language model: loaded once per process, viewed by every trial, and changed by LoRA only."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from data.errors import ConfigError, UnavailableError, UserError, reason
from model.checkpoints.audio_llms import FAMILIES, refuse_unsupported
from model.config import LLMConfig, LoadIn, ModelConfig
from model.encoders.audio_llms import build_language_model, language_config
from model.runtime.memory import cached
from model.speech_llm.attention import set_attention
from model.speech_llm.kernels import fuse_lora
from model.speech_llm.quantization import dequantize, quantization_config, shared_weights, use_own_products

Module = TypeVar("Module", bound=nn.Module)


@cached
def load_llm(path: str, dtype: str, device: str, load_in: LoadIn = "none") -> PreTrainedModel:
    """Load a causal language model, frozen and in evaluation mode. The trials of a process share it, see `cached`.

    Of an audio LLM this is the language model alone.

    Args:
        path: Hugging Face id or local folder.
        dtype: of the weights.
        device: "cpu", "cuda", or "meta" for a model without values, made from the configuration alone; its weights have
            the shapes of those that are not quantized.
        load_in: how the weights of linear layers are stored.

    Raises:
        ConfigError: the model cannot be loaded, or weights are missing, which transformers would draw at random.
        UnavailableError: weights are to be quantized, and bitsandbytes is not installed.
    """
    missing: set[str] = set()
    kind: torch.dtype = getattr(torch, dtype)
    quantized = load_in != "none"
    options = (
        {"quantization_config": quantization_config(load_in, kind), "device_map": {"": device}} if quantized else {}
    )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            refuse_unsupported(path)
        has_encoder = config.model_type in FAMILIES
        if device == "meta":
            with torch.device("meta"):
                text = language_config(config) if has_encoder else config
                model = AutoModelForCausalLM.from_config(text, dtype=kind)
        elif has_encoder:
            with torch.random.fork_rng(devices=[]):
                model, missing = build_language_model(path, config, kind, options)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=kind, output_loading_info=True, trust_remote_code=False, **options
            )
            missing = set(report["missing_keys"])
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise many types for a broken folder
        refuse_unsupported(path)
        raise UnavailableError(f"model.llm.path: cannot load a causal LM from {path}: {reason(error)}") from None
    if missing:
        raise UnavailableError(
            f"model.llm.path: {path} lacks {len(missing)} of the LLM's tensors ({min(missing)}, ...); use a complete "
            "checkpoint"
        )
    # The model's generation_config.json (sampling, penalties, suppressed tokens) would change greedy decoding.
    model.generation_config = GenerationConfig()
    if quantized and device != "meta":
        use_own_products(model)
    else:
        model.to(device)
    return model.requires_grad_(False).eval()


def load_base(config: LLMConfig, device: str) -> PreTrainedModel:
    """Return the language model that all trials with these settings share, see `load_llm`."""
    return load_llm(config.path, config.dtype, device, config.load_in)


def load_llm_with_lora(model: ModelConfig, device: str) -> PreTrainedModel:
    """Return a view of the language model for one trial, with LoRA layers (Hu et al., 2021, arXiv 2106.09685).

    Raises:
        ConfigError: see `load_llm` and `set_attention`; a LoRA target matches no layer, or there are fewer layers than
            are to be recomputed.
    """
    config, lora = model.llm, model.lora
    llm = shared_view(load_base(config, device))
    if not {"inputs_embeds", "position_ids", "logits_to_keep"} <= inspect.signature(llm.forward).parameters.keys():
        raise ConfigError(
            f"model.llm.path: {config.path} is a {llm.config.model_type} model, which takes no positions or no "
            "embeddings, so padding could not be masked; use a model such as Llama, Qwen, Gemma or Mistral"
        )
    set_attention(llm, model, device)
    if config.gradient_checkpointing:
        _recompute_layers(llm, config)
    if not lora.enabled:
        return llm
    linear, experts = _linear_layers(llm), expert_weights(llm)
    routers = {name for name, module in llm.named_modules() if _is_router(module)}
    targets = [] if lora.targets == "all-linear" else lora.targets
    fused = [name for name in targets if name not in linear and name in experts]
    if unknown := [name for name in targets if name not in linear and name not in experts]:
        fused_names = f", and fused experts: {', '.join(sorted(experts))}" if experts else ""
        raise ConfigError(
            f"model.lora.targets: {', '.join(unknown)} match no linear layer; the LLM has {', '.join(sorted(linear))}"
            f"{fused_names}"
        )
    if fused and (lora.dropout or lora.dora):
        raise ConfigError(
            f"model.lora.targets: {', '.join(fused)} are fused experts, for which LoRA has neither dropout nor DoRA; "
            "set model.lora.dropout=0 and model.lora.dora=false, or take them out"
        )
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha_ratio is None else lora.alpha_ratio * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=[name for name in targets if name not in fused] if targets else "all-linear",
        target_parameters=fused or None,
        exclude_modules=sorted(routers) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    try:
        adapted = get_peft_model(llm, peft_config).requires_grad_(False)
    except ValueError as error:
        # "all-linear" includes the fused experts of some families, see `lora_reach`.
        fix = "set model.lora.dropout=0, or " if "lora_dropout" in str(error) else ""
        raise ConfigError(
            f"model.lora.targets: {lora.targets} cannot be adapted in this LLM ({reason(error)}); {fix}choose among "
            f"{', '.join(sorted(linear))}"
        ) from None
    fuse_lora(adapted)
    return adapted


def merge_lora(llm: PreTrainedModel) -> PreTrainedModel:
    """Return an LLM with LoRA added to its weights, computed in copies: other models share the tensors.

    Quantized weights become plain ones of the same value, so the scores stay those of the trained model.
    """
    dequantize(llm)
    if not hasattr(llm, "peft_config"):
        return llm
    head = llm.get_output_embeddings()
    if hasattr(head, "base_layer") and llm.config.tie_word_embeddings:
        # The update changes the head alone, and the embeddings, which are the same tensor, stay as they are.
        head.base_layer.weight = nn.Parameter(head.base_layer.weight.detach().clone(), requires_grad=False)
        llm.config.tie_word_embeddings = False
    merged: PreTrainedModel = llm.merge_and_unload(safe_merge=True)
    return merged


def _recompute_layers(llm: PreTrainedModel, config: LLMConfig) -> None:
    """Let the first layers of an LLM compute their activations again in the backward pass."""
    llm.activation_checkpointing_enable({"use_reentrant": False})
    count, layers = config.gradient_checkpointing, llm_layers(llm)
    if count is True:
        return
    if count > len(layers):
        raise ConfigError(
            f"model.llm.gradient_checkpointing: {count} layers, and {config.path} has {len(layers)}; lower it, or set "
            "true for all"
        )
    for layer in layers[count:]:
        layer.gradient_checkpointing = False


def llm_layers(llm: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers of an LLM, one above the other."""
    return [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]


def _linear_layers(llm: nn.Module) -> set[str]:
    """Return the last names of the linear layers."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not _is_router(module)
    }


def _is_router(module: nn.Module) -> bool:
    """Return whether a linear layer is the router of a mixture of experts, which returns more than its product."""
    return isinstance(module, nn.Linear) and "router" in type(module).__name__.lower()


def expert_weights(llm: nn.Module) -> set[str]:
    """Return the names of weights of a mixture of experts that hold all experts in one tensor, without their layers.

    They belong to no linear layer, so "all-linear" does not reach them. "experts.down_proj" names one in all layers.
    """
    names = (name for name, tensor in llm.named_parameters() if _is_fused(name, tensor))
    return {".".join(name.replace(".base_layer", "").split(".")[-2:]) for name in names}


def _is_fused(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 3 and "lora_" not in name and "conv" not in name


@dataclass(frozen=True)
class LoraReach:
    """Which weights of an LLM its LoRA layers change. Embeddings and the LM head do not count."""

    share: float  # of the weights, by number of parameters
    reached: tuple[str, ...]  # names of layers, the largest first
    missed: tuple[tuple[str, float], ...]  # names of the others with their shares, the largest first
    misses_experts: bool  # whether fused experts are among these


def lora_reach(llm: PreTrainedModel) -> LoraReach | None:
    """Return which weights LoRA reaches; None without LoRA."""
    if not hasattr(llm, "peft_config"):
        return None
    adapted = {name.partition(".lora_")[0] for name, _ in llm.named_parameters() if ".lora_" in name}
    outside = {name for name, module in llm.named_modules() if isinstance(module, nn.Embedding)}
    outside |= {name for name, module in llm.named_modules() if module is llm.get_output_embeddings()}
    sizes: dict[tuple[str, bool], int] = {}
    fused_missed = False
    targets = set(llm.peft_config["default"].target_parameters or ())
    for name, tensor in llm.named_parameters():
        owner = name.rpartition(".")[0]
        if tensor.ndim < 2 or "lora_" in name or owner in outside:
            continue
        plain = name.replace(".base_layer", "")
        pair = ".".join(plain.split(".")[-2:])
        if _is_fused(name, tensor):
            short, reached = pair, pair in targets or pair.rpartition(".")[2] in targets
            fused_missed |= not reached
        else:
            short, reached = pair.removesuffix(".weight"), owner.removesuffix(".base_layer") in adapted
        sizes[short, reached] = sizes.get((short, reached), 0) + tensor.numel()
    total = sum(sizes.values()) or 1
    ordered = sorted(sizes, key=lambda key: -sizes[key])
    return LoraReach(
        share=sum(size for (_, reached), size in sizes.items() if reached) / total,
        reached=tuple(name for name, reached in ordered if reached),
        missed=tuple((name, sizes[name, reached] / total) for name, reached in ordered if not reached),
        misses_experts=fused_missed,
    )


def max_positions(llm: PreTrainedModel) -> int | None:
    """Return the length of the longest sequence in which every token sees all before it; None if there is no limit.

    A sliding window counts as a limit: beyond it, losses and label scores would see different tokens.
    """
    config = llm.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        limits.append(getattr(config, "sliding_window", None))
    return min((limit for limit in limits if limit is not None), default=None)


@contextlib.contextmanager
def head_at_positions(head: nn.Module, rows_P: Tensor, columns_P: Tensor) -> Iterator[None]:
    """Let the LM head compute logits_PV of these positions alone instead of logits_BTV, which may not fit in memory."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows_P, columns_P],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def embedding_scale(layer: nn.Embedding) -> float:
    """Return the standard deviation of what an embedding layer puts out.

    Some layers multiply their weights, as Gemma 3's does by the square root of the width. The factor is measured on a
    few tokens: the embeddings of a whole vocabulary would take gigabytes.
    """
    weight_VE = layer.weight
    ids = torch.linspace(0, len(weight_VE) - 1, min(len(weight_VE), 256), device=weight_VE.device).long()
    factor = layer(ids).float().norm() / weight_VE[ids].float().norm()
    scale: float = (weight_VE.float().std() * factor).item()
    return scale


def shared_view(base: Module) -> Module:
    """Return a frozen copy of a module tree over the same tensors.

    Modules, hooks and flags are copied, so whatever is done to the copy (LoRA layers, `requires_grad`) leaves no trace
    on `base`.
    """
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in base.parameters()
    }
    return copy.deepcopy(base, memo | shared_weights(base))


def copy_parameters(model: nn.Module, names: set[str]) -> None:
    """Replace parameters of a shared view by copies, so that they can be written to. Tied ones share one copy."""
    owners = [
        (f"{path}.{name}" if path else name, module, name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    selected = {id(parameter) for full_name, *_, parameter in owners if full_name in names}
    copies: dict[int, nn.Parameter] = {}
    for _, module, name, parameter in owners:
        if id(parameter) in selected:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module.register_parameter(name, copies[id(parameter)])
