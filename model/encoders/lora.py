"""LoRA on the layers of a speech encoder (Hu et al., 2021, arXiv 2106.09685), by PEFT."""

from collections.abc import Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from data.errors import ConfigError
from model.compat import ADAPTER
from model.config import EncoderLora
from model.encoders.base import SpeechEncoder


def add_lora(encoder: SpeechEncoder, lora: EncoderLora) -> None:
    """Put LoRA layers around linear layers of an encoder, in place; they start as no change.

    Args:
        encoder: a view that belongs to one trial, with the layers that are heard.
        lora: settings with a rank.

    Raises:
        ConfigError: the encoder has fewer layers, or a target is no linear layer that can be adapted.
    """
    layers = encoder.transformer.layers
    count = len(layers) if lora.layers is None else lora.layers
    if count > len(layers) or not layers:
        raise ConfigError(
            f"model.encoder.lora.layers: {count or 'all'} upper layers cannot be adapted, since the encoder has "
            f"{len(layers)} up to the highest one that is heard; lower it, or set model.encoder.lora.rank=0"
        )
    adapted = {id(module) for layer in layers[len(layers) - count :] for module in layer.modules()}
    linear = {
        path: path.rpartition(".")[2]
        for path, module in encoder.model.named_modules()
        if id(module) in adapted and isinstance(module, nn.Linear)
    }
    possible = sorted(set(linear.values()) - encoder.not_adaptable)
    targets = possible if lora.targets == "all-linear" else lora.targets
    if unknown := sorted(set(targets) - set(possible)):
        raise ConfigError(
            f"model.encoder.lora.targets: {', '.join(unknown)} match no linear layer that can be adapted in this "
            f"encoder ({encoder.model.config.model_type}); choose among {', '.join(possible)}, or all-linear"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha_ratio is None else lora.alpha_ratio * lora.rank,
        target_modules=[path for path, name in linear.items() if name in targets],
    )
    inject_adapter_in_model(config, encoder.model, ADAPTER)


@torch.no_grad()
def merged_tensors(encoder: SpeechEncoder) -> Mapping[str, Tensor]:
    """Return the tensors of the encoder's model with LoRA added to its weights, under the names without LoRA."""
    tensors = dict(encoder.model.state_dict())
    for path, module in encoder.model.named_modules():
        if isinstance(module, LoraLayer):
            inside = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.")}
            tensors |= {name.replace(".base_layer", ""): x for name, x in inside.items() if ".base_layer." in name}
            tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + module.get_delta_weight(ADAPTER)
    return tensors
