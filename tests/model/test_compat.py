"""The private APIs of dependencies in `model/compat.py` still exist and do what they are used for."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    WavLMConfig,
    WavLMModel,
)

from model.compat import freeze_feature_encoder, lora_parameter_names, skip_steps_if
from tests.tiny_models import SMALL

TINY = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)


def test_freeze_feature_encoder_leaves_the_autograd_graph() -> None:
    kinds: list[tuple[type[PreTrainedModel], type]] = [(HubertModel, HubertConfig), (WavLMModel, WavLMConfig)]
    for model, config in kinds:
        convolutions = model(config(**SMALL, conv_dim=(8,) * 7)).train().feature_extractor
        assert convolutions(torch.zeros(1, 400)).requires_grad
        freeze_feature_encoder(convolutions)
        assert not convolutions(torch.zeros(1, 400)).requires_grad


@pytest.mark.parametrize("dora", [False, True])
def test_lora_parameter_names_invert_those_of_peft(dora: bool) -> None:
    model = get_peft_model(LlamaForCausalLM(TINY), LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora))
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert lora_parameter_names(saved).keys() == names
    assert len(names) == 2 + dora


def test_fused_optimizer_skips_steps_if_flag_is_set() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, flag = torch.optim.AdamW([parameter], lr=0.1, fused=True), torch.zeros(())
    skip_steps_if(flag, optimizer)
    parameter.grad = torch.ones(3)
    for value, moves in ((1.0, False), (0.0, True)):
        flag.fill_(value)
        before = parameter.detach().clone()
        optimizer.step()
        assert torch.equal(parameter, before) is not moves
