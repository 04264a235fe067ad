"""Conformer encoders: wav2vec2-conformer over the waveform and w2v-BERT over log-mel features.

A convolution in each conformer layer would read the padding behind a clip, which is not zero inside the model.

Legend: B clips, F frames, D width of the encoder or of its input.
"""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, SequenceFeatureExtractor

from model.encoders.masked_layers import MaskedConv1d, pad_rows, valid_mask
from model.encoders.wav2vec2 import PaddedBatchEncoder, WaveformEncoder


class Wav2Vec2ConformerEncoder(WaveformEncoder):
    """wav2vec2-conformer: the convolution of each layer is masked by us."""

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        super().__init__(model, extractor)
        model.encoder.pos_conv_embed.requires_grad_(False)  # part of the checkpoint, but never computed
        for layer in model.encoder.layers:
            layer.conv_module.depthwise_conv = MaskedConv1d(layer.conv_module.depthwise_conv)
            self.convolutions.append(layer.conv_module.depthwise_conv)

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.model.encoder.layer_norm
        return norm

    def _layer_arguments(self, hidden_BFD: Tensor, valid_BF: Tensor, lengths_B: Tensor) -> dict[str, Tensor | None]:
        for convolution in self.convolutions:
            convolution.lengths_B = lengths_B
        arguments = super()._layer_arguments(hidden_BFD, valid_BF, lengths_B)
        return arguments | relative_positions(self.model, hidden_BFD)


class Wav2Vec2BertEncoder(PaddedBatchEncoder):
    """w2v-BERT: a conformer whose frame is `extractor.stride` stacked log-mel steps. The model masks convolutions."""

    input_name = "input_features"
    WINDOW, HOP = 400, 160  # samples of a log-mel step, fixed in SeamlessM4TFeatureExtractor

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        super().__init__(model, extractor)
        steps = max(2, extractor.stride)  # the extractor normalises over time, and one step has no variance
        self.min_samples = self.WINDOW + (steps - 1) * self.HOP

    @property
    def final_norm(self) -> nn.Module:
        return nn.Identity()

    @property
    def frozen_layers(self) -> int:
        # The optional feed-forward block follows the layers and is no part of `forward_from_layer`.
        return 0 if self.model.intermediate_ffn else super().frozen_layers

    def _drop_final_norm(self) -> None:
        self.model.intermediate_ffn = None

    def _count_frames(self, n_samples: int) -> int:
        steps = (n_samples - self.WINDOW) // self.HOP + 1
        frames: int = steps // self.extractor.stride
        return frames

    def _model_inputs(self, clips: list[np.ndarray], lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        # The extractor pads an odd number of steps with a step of zeros, which makes a frame that is half padding.
        features = [self._extract(clip)[: self._count_frames(len(clip))] for clip in clips]
        features_BFD = pad_rows([torch.as_tensor(feature) for feature in features])
        return features_BFD, valid_mask(lengths_B, features_BFD.shape[1])

    def _layer_arguments(self, hidden_BFD: Tensor, valid_BF: Tensor, lengths_B: Tensor) -> dict[str, Tensor | None]:
        arguments = super()._layer_arguments(hidden_BFD, valid_BF, lengths_B)
        return arguments | relative_positions(self.model, hidden_BFD) | {"conv_attention_mask": valid_BF}


def relative_positions(model: PreTrainedModel, hidden_BFD: Tensor) -> dict[str, Tensor | None]:
    """Return the argument with which a conformer tells its layers the distances between frames."""
    embed = model.encoder.embed_positions
    return {"relative_position_embeddings": None if embed is None else embed(hidden_BFD)}
