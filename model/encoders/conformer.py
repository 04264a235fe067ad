"""Conformer encoders: wav2vec2-conformer and w2v-BERT."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.encoders.masked_layers import MaskedConv1d, _padded, _valid
from model.encoders.wav2vec2 import PaddedEncoder, WaveEncoder


class ConformerEncoder(WaveEncoder):
    """wav2vec2-conformer: the convolution in each layer would read its neighbour's padding, which is not zero there."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model, extractor)
        model.encoder.pos_conv_embed.requires_grad_(False)  # part of the checkpoint, but never computed
        for layer in model.encoder.layers:
            layer.conv_module.depthwise_conv = MaskedConv1d(layer.conv_module.depthwise_conv)
            self.convolutions.append(layer.conv_module.depthwise_conv)

    @property
    def norm(self) -> nn.Module:
        last: nn.Module = self.stack.layer_norm
        return last

    def _beside(self, hidden_BFD: Tensor, valid_BF: Tensor, lengths_B: Tensor) -> dict[str, Any]:
        for convolution in self.convolutions:
            convolution.lengths_B = lengths_B
        return super()._beside(hidden_BFD, valid_BF, lengths_B) | self._positions(hidden_BFD)


class FilterbankEncoder(PaddedEncoder):
    """w2v-BERT: a conformer over log-mel steps, `stride` of which are stacked to one frame."""

    reads = "input_features"
    WINDOW, HOP = 400, 160  # samples, fixed in SeamlessM4TFeatureExtractor

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model, extractor)
        steps = max(2, extractor.stride)  # of one step alone, the normalisation over time has no variance
        self.minimum = self.WINDOW + (steps - 1) * self.HOP

    def _frames(self, n_samples: int) -> int:
        steps: int = (n_samples - self.WINDOW) // self.HOP + 1
        return steps // self.extractor.stride  # type: ignore[no-any-return]

    def _inputs(self, clips: list[np.ndarray], lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        # The extractor fills an odd number of steps up with one of zeros, and so makes a frame that is only half one.
        whole = [self._features(clip)[: self._frames(len(clip))] for clip in clips]
        features_BFM = _padded([torch.as_tensor(features) for features in whole])
        return features_BFM, _valid(lengths_B, features_BFM.shape[1])

    @property
    def norm(self) -> nn.Module:
        return nn.Identity()

    @property
    def frozen_layers(self) -> int:
        return 0 if self.model.intermediate_ffn else super().frozen_layers  # which follows the layers, too

    def _beside(self, hidden_BFD: Tensor, valid_BF: Tensor, lengths_B: Tensor) -> dict[str, Any]:
        beside = super()._beside(hidden_BFD, valid_BF, lengths_B) | self._positions(hidden_BFD)
        return beside | {"conv_attention_mask": valid_BF}
