"""The language model: loaded once a process, viewed by every trial, changed by LoRA only."""

import copy
import inspect
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from data.errors import ConfigError, reason
from model.config import LLMConfig, LoraSettings
from model.runtime.memory import kept


@kept
def load_llm(path: str, dtype: str, device: str) -> nn.Module:
    """Load a causal language model, frozen; trials of a process share it, see `kept`.

    Args:
        path: Hugging Face id or local folder.
        dtype: of the weights.
        device: e.g. "cpu" or "cuda"; "meta" reads the configuration only and makes a model without weights.

    Raises:
        ConfigError: nothing can be loaded from there, or weights are missing: random ones would stand in for them.
    """
    missing: set[str] = set()
    try:
        if device == "meta":
            with torch.device("meta"):
                settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
                model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False
            )
            missing = set(report["missing_keys"])
    except Exception as error:  # the folder's fault, and the libraries have errors of their own
        raise ConfigError(f"model.llm.path: cannot load a causal LM from {path}: {reason(error)}") from None
    if missing:
        raise ConfigError(
            f"model.llm.path: {path} lacks {len(missing)} of the LLM's tensors ({min(missing)}, ...); use a complete "
            "checkpoint"
        )
    # Its generation_config.json (sampling, penalties, suppressed tokens) would change what greedy decoding says.
    model.generation_config = GenerationConfig()
    return model.to(device).requires_grad_(False).eval()  # type: ignore[no-any-return]


def adapted_llm(config: LLMConfig, lora: LoraSettings, device: str) -> Any:
    """A trial's own view of the language model, with its LoRA layers.

    Raises:
        ConfigError: see `load_llm`, or a LoRA target matches nothing.
    """
    llm = shared_view(load_llm(config.path, config.dtype, device))
    if not {"inputs_embeds", "position_ids", "logits_to_keep"} <= inspect.signature(llm.forward).parameters.keys():
        raise ConfigError(
            f"model.llm.path: {config.path} is a {llm.config.model_type} model, which takes no positions or no "
            "embeddings, so padding could not be kept out; use one like Llama, Qwen, Gemma or Mistral"
        )
    if config.gradient_checkpointing:
        llm.activation_checkpointing_enable({"use_reentrant": False})
    return _with_lora(llm, lora) if lora.enabled else llm


def _with_lora(llm: nn.Module, settings: LoraSettings) -> Any:
    known = {name.rsplit(".", 1)[-1] for name, module in llm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    unknown = [] if settings.targets == "all-linear" else [name for name in settings.targets if name not in known]
    if unknown:
        raise ConfigError(
            f"model.lora.targets: {', '.join(unknown)} match no linear layer; the LLM has {', '.join(sorted(known))}"
        )
    ratio = settings.alpha_ratio
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha if ratio is None else ratio * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )
    try:
        return get_peft_model(llm, config).requires_grad_(False)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.targets: {settings.targets} cannot be adapted in this LLM ({reason(error)}); choose among "
            f"{', '.join(sorted(known))}"
        ) from None


def reach(llm: Any) -> int | None:
    """The longest sequence that the model reads as a whole; None where nothing is said."""
    config = llm.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        limits.append(getattr(config, "sliding_window", None))  # beyond it, scores and losses would see other tokens
    return min((limit for limit in limits if limit is not None), default=None)


def shared_view(base: Any) -> Any:
    """A copy of a module tree over the very tensors of `base`, frozen.

    Modules, hooks and flags are fresh, so that nothing done to the copy (LoRA layers, `requires_grad`) stays behind.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in base.parameters()
    }
    return copy.deepcopy(base, memo)


def own_tensors(model: nn.Module, names: set[str]) -> None:
    """Replace parameters by copies of their own, tied ones by one copy, so that they may be written to."""
    copies: dict[int, nn.Parameter] = {}
    found = [
        (f"{path}.{name}" if path else name, module, name)
        for path, module in model.named_modules()
        for name in module._parameters
    ]
    wanted = {id(module._parameters[name]) for path, module, name in found if path in names}
    for _, module, name in found:
        parameter = module._parameters[name]
        if parameter is not None and id(parameter) in wanted:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module._parameters[name] = copies[id(parameter)]
