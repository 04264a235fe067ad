"""The implementation of attention of an LLM, `model.llm.attention`.

The kernels of the package `flash_attn` know causal attention and padding, and no other mask. Labels of a trie need one:
such a pass is computed by `sdpa`, also where the LLM uses flash attention.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data.errors import ConfigError, UnavailableError, reason
from model.compat import supports_flash_attention
from model.config import ModelConfig

FLASH = "flash_attention_2"
LEAST_CAPABILITY = (8, 0)  # of a GPU that computes flash attention
KEY = "model.llm.attention"


def set_attention(llm: PreTrainedModel, config: ModelConfig, device: str) -> None:
    """Let an LLM use the implementation of attention that its configuration names.

    Args:
        llm: whose configuration is no other model's.
        config: of the model.
        device: "cpu", "cuda", or "meta", where flash attention is checked as far as that needs no GPU.

    Raises:
        ConfigError: the LLM has no such implementation, or it is to compute in float32.
        UnavailableError: a package is not installed, or the device cannot compute it.
    """
    name = config.llm.attention
    if name == "auto":
        return
    if name == FLASH:
        _check_flash_attention(llm, config, device)
        if device == "meta":
            return
    try:
        llm.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{KEY}: {name} is not supported by the {llm.config.model_type} model {config.llm.path} ({reason(error)}); "
            "set auto"
        ) from None


def _check_flash_attention(llm: PreTrainedModel, config: ModelConfig, device: str) -> None:
    if find_spec("flash_attn") is None:
        raise UnavailableError(f"{KEY}: {FLASH} needs the package flash_attn, which is not installed; set auto")
    if not supports_flash_attention(llm):
        raise ConfigError(
            f"{KEY}: {FLASH} is not supported by the {llm.config.model_type} model {config.llm.path}; set auto"
        )
    if "bfloat16" not in (config.precision, config.llm.dtype):
        raise ConfigError(
            f"{KEY}: {FLASH} computes in half precision; set model.precision=bfloat16 or model.llm.dtype=bfloat16, or "
            "set attention to auto"
        )
    if device == "cpu":
        raise UnavailableError(f"{KEY}: {FLASH} needs a GPU, and this model is computed on a CPU; set auto")
    if device == "cuda" and (capability := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        raise UnavailableError(
            f"{KEY}: {FLASH} needs a GPU of compute capability {least} or newer, and this one has {found}; set auto"
        )


def masked_flash_attention(
    module: nn.Module,
    query_BQTD: Tensor,
    key_BQTD: Tensor,
    value_BQTD: Tensor,
    attention_mask: Tensor | None,
    **options: object,
) -> tuple[Tensor, None]:
    """Compute flash attention, or `sdpa` where a mask says for each position what it sees.

    Args:
        module: the attention layer.
        query_BQTD: its queries.
        key_BQTD: its keys, perhaps with fewer heads.
        value_BQTD: its values.
        attention_mask: None, which positions are no padding [B, T], or what is added to scores [B, 1, T, T].
        options: of a family.

    Returns:
        The outputs [B, T, Q, D].
    """
    compute = flash_attention_forward if attention_mask is None or attention_mask.ndim == 2 else sdpa_attention_forward
    outputs: tuple[Tensor, None] = compute(module, query_BQTD, key_BQTD, value_BQTD, attention_mask, **options)
    return outputs


AttentionInterface.register(FLASH, masked_flash_attention)
