"""The families of speech encoders, each made independent of what else is in the batch.

Legend: B clips, N samples, F frames, D width, C channels, T steps of a convolution, M mel bands, W windows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from model.encoders.base import SpeechEncoder
from model.encoders.masked_layers import MaskedConv1d, MaskedGroupNorm, _padded, _valid


class PaddedEncoder(SpeechEncoder):
    """The wav2vec 2.0 family: all clips in one padded batch, with a mask."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model, extractor)
        # SpecAugment and layer drop would draw from global generators in an order that depends on the batch. The first
        # stays on only for the masks that are given.
        config = model.config
        config.mask_time_prob = config.mask_feature_prob = config.layerdrop = 0.0
        config.apply_spec_augment = True
        if not hasattr(model, "masked_spec_embed"):  # trained without SpecAugment: a hidden frame is zero
            zeros_D = torch.zeros(self.width, device=model.device)
            model.register_buffer("masked_spec_embed", zeros_D, persistent=False)
        positions: Any = getattr(model.encoder, "embed_positions", None)
        if hasattr(positions, "pe"):
            positions.register_buffer("exact", positions.pe, persistent=False)

    @classmethod
    def obstacle(cls, config: Any, extractor: Any) -> str | None:
        if getattr(config, "add_adapter", False):
            return (
                "its convolutional adapter (add_adapter) reads a clip's padding as if it were sound; set add_adapter "
                "to false in its config.json to use the frames before it"
            )
        return super().obstacle(config, extractor)

    def _encode(self, clips: list[np.ndarray], masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Tensor]:
        lengths_B = torch.tensor([self._frames(len(clip)) for clip in clips], device=self.device)
        inputs, valid = self._inputs(clips, lengths_B)
        hide = {}
        if masks is not None:
            hide["mask_time_indices"] = _padded([torch.as_tensor(mask) for mask in masks]).to(self.device)
        self._forget_positions()
        inputs = inputs.to(self.device, self.model.dtype)
        hidden_BFD = self.model(inputs, attention_mask=valid.long(), **hide).last_hidden_state
        return hidden_BFD * _valid(lengths_B, hidden_BFD.shape[1])[:, :, None], lengths_B

    def rest(self, hidden: Sequence[Tensor], n_samples: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
        lengths_B = torch.tensor([self.frames(count) for count in n_samples], device=self.device)
        hidden_BFD = _padded(list(hidden)).to(self.device, self.model.dtype)
        valid_BF = _valid(lengths_B, hidden_BFD.shape[1])
        self._forget_positions()
        beside = self._beside(hidden_BFD, valid_BF, lengths_B)
        for layer in self.stack.layers[start:]:
            found = layer(hidden_BFD, **beside)
            hidden_BFD = found[0] if isinstance(found, tuple) else found
        return self.norm(hidden_BFD) * valid_BF[:, :, None], lengths_B

    @property
    def stack(self) -> Any:
        return self.model.encoder

    def _beside(self, hidden_BFD: Tensor, valid_BF: Tensor, lengths_B: Tensor) -> dict[str, Any]:
        """What the model gives each layer besides the hidden states."""
        mask = create_bidirectional_mask(self.stack.config, hidden_BFD, valid_BF)
        return {"attention_mask": mask}

    def _forget_positions(self) -> None:
        """Position embeddings are kept from batch to batch, rounded to the precision of an earlier one."""
        positions: Any = getattr(self.model.encoder, "embed_positions", None)
        if hasattr(positions, "exact"):
            positions.pe = positions.exact
        elif positions is not None:
            positions.cached_sequence_length = None

    def _positions(self, hidden_BFD: Tensor) -> dict[str, Any]:
        """What a conformer's encoder gives each of its layers about distances."""
        embed = self.stack.embed_positions
        return {"relative_position_embeddings": None if embed is None else embed(hidden_BFD)}

    def _inputs(self, clips: list[np.ndarray], lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the model takes, padded, and which of it is a clip's own."""
        raise NotImplementedError


class WaveEncoder(PaddedEncoder):
    """HuBERT, wav2vec 2.0 and WavLM: convolutions over the waveform, then a transformer."""

    reads = "input_values"

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model, extractor)
        self.strides = list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))
        self.minimum = 1
        for kernel, stride in reversed(self.strides):
            self.minimum = (self.minimum - 1) * stride + kernel
        model.feature_extractor._freeze_parameters()
        self.norms: list[MaskedGroupNorm] = []
        self.convolutions: list[MaskedConv1d] = []  # over frames, where the model itself does not zero the padding
        if model.config.feat_extract_norm == "group":
            first = model.feature_extractor.conv_layers[0]
            first.layer_norm = MaskedGroupNorm(first.layer_norm)
            self.norms.append(first.layer_norm)
        positions = model.encoder.pos_conv_embed
        if getattr(positions, "batch_norm", None) is not None:  # it shifts the zeros of the padding
            positions.conv = MaskedConv1d(positions.conv)
            self.convolutions.append(positions.conv)

    def _frames(self, n_samples: int) -> int:
        for kernel, stride in self.strides:
            n_samples = (n_samples - kernel) // stride + 1
        return n_samples

    def _inputs(self, clips: list[np.ndarray], lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        counts_B = torch.tensor([len(clip) for clip in clips], device=self.device)
        kernel, stride = self.strides[0]
        for norm in self.norms:
            norm.lengths_B = (counts_B - kernel) // stride + 1
        for convolution in self.convolutions:
            convolution.lengths_B = lengths_B
        samples_BN = _padded([torch.as_tensor(self._features(clip)) for clip in clips])
        return samples_BN, _valid(counts_B, samples_BN.shape[1])

    @property
    def norm(self) -> nn.Module:
        last: nn.Module = self.stack.layer_norm if self.model.config.do_stable_layer_norm else nn.Identity()
        return last


class WavLMEncoder(WaveEncoder):
    """WavLM: the first layer computes a bias by distance, which the others get from it."""

    def _beside(self, hidden_BFD: Tensor, valid_BF: Tensor, lengths_B: Tensor) -> dict[str, Any]:
        n_clips, n_frames = valid_BF.shape
        bias_HFF = self.stack.layers[0].attention.compute_bias(n_frames, n_frames)
        return {"attention_mask": valid_BF.long(), "position_bias": bias_HFF.repeat(n_clips, 1, 1)}
