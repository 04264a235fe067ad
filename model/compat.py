"""Private APIs of dependencies that `model` needs, each with the version it was checked against.

tests/model/test_compat.py fails when one of them disappears.
"""

from typing import Protocol

import torch
from torch import Tensor

ADAPTER = "default"  # PEFT's name of a model's only adapter, which its files leave out


class FeatureEncoder(Protocol):
    """The convolutions of a wav2vec 2.0 model in transformers."""

    def _freeze_parameters(self) -> None: ...


def freeze_feature_encoder(module: FeatureEncoder) -> None:
    """Freeze the convolutions of a wav2vec 2.0 model and keep them out of the autograd graph (transformers 5.23).

    `requires_grad_(False)` alone would leave the graph: the module marks its input as requiring gradients in training.
    `freeze_feature_encoder` is public on models with a head, but missing on HubertModel.
    """
    module._freeze_parameters()


def lora_parameter_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of PEFT's adapter_model.safetensors under the parameter names of a `PeftModel`.

    peft 0.21.2: `peft.utils.save_and_load._insert_adapter_name_into_state_dict`. The public
    `set_peft_model_state_dict` does the same, but only for a model that is loaded.
    """
    from peft.utils.save_and_load import _insert_adapter_name_into_state_dict

    # The files leave out `.weight` after DoRA's magnitudes.
    full = {f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: x for name, x in tensors.items()}
    named: dict[str, Tensor] = _insert_adapter_name_into_state_dict(full, ADAPTER, "lora_")
    return named


def skip_steps_if(flag: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Let a fused optimizer skip its step on the device while `flag` (float, a scalar on the device) is not 0.

    torch 2.14.1: fused optimizers read `found_inf`, which `torch.amp.GradScaler` sets.
    """
    optimizer.found_inf = flag  # type: ignore[attr-defined]
