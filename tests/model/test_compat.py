"""The private APIs of dependencies in `model/compat.py` still exist and do what they are used for."""

import torch
from transformers import HubertConfig, HubertModel, PreTrainedModel, WavLMConfig, WavLMModel

from model.compat import freeze_feature_encoder
from tests.tiny_models import SMALL


def test_freeze_feature_encoder_leaves_the_autograd_graph() -> None:
    kinds: list[tuple[type[PreTrainedModel], type]] = [(HubertModel, HubertConfig), (WavLMModel, WavLMConfig)]
    for model, config in kinds:
        convolutions = model(config(**SMALL, conv_dim=(8,) * 7)).train().feature_extractor
        assert convolutions(torch.zeros(1, 400)).requires_grad
        freeze_feature_encoder(convolutions)
        assert not convolutions(torch.zeros(1, 400)).requires_grad
