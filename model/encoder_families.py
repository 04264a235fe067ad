"""The families of speech encoders, each made independent of what else is in the batch.

Legend: B clips, N samples, F frames, D width, C channels, T steps of a convolution, M mel bands, W windows.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from model.speech_encoder import SpeechEncoder


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


class MelEncoder(SpeechEncoder):
    """Whisper's encoder: a log-mel window of fixed length; longer clips are read window by window."""

    reads = "input_features"
    minimum = 1

    def __init__(self, model: Any, extractor: Any) -> None:
        encoder = model.get_encoder()
        super().__init__(encoder, extractor)
        encoder.layerdrop = 0.0
        for part in (encoder.conv1, encoder.conv2, encoder.embed_positions):  # the last are sinusoids
            part.requires_grad_(False)
        self.window: int = extractor.n_samples  # samples
        self.samples_per_frame: int = extractor.hop_length * 2  # the second convolution halves the mel rate

    @classmethod
    def obstacle(cls, config: Any, extractor: Any) -> str | None:
        if getattr(extractor, "dither", 0.0) != 0.0:
            return (
                "its feature extractor adds noise (dither), drawn in an order that depends on the batch; set dither "
                "to 0 in its preprocessor_config.json"
            )
        return super().obstacle(config, extractor)

    def _frames(self, n_samples: int) -> int:
        return -(-n_samples // self.samples_per_frame)

    def cost(self, n_samples: int) -> int:
        windows = -(-n_samples // self.window)  # each is computed whole
        return windows * self._frames(self.window)

    def _encode(self, clips: list[np.ndarray], masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Tensor]:
        pieces = [_cut(clip, self.window) for clip in clips]
        mels = [self._features(piece) for piece in chain(*pieces)]
        if masks is not None:
            windows = chain(*(_cut(mask, self._frames(self.window)) for mask in masks))
            for mel_MT, mask in zip(mels, windows, strict=True):
                mel_MT[:, : 2 * len(mask)][:, np.repeat(mask, 2)] = 0.0
        mels_WMT = torch.as_tensor(np.stack(mels)).to(self.device, self.model.dtype)
        return self._whole(self.model(mels_WMT).last_hidden_state, [len(clip) for clip in clips])

    def rest(self, hidden: Sequence[Tensor], n_samples: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
        hidden_WFD = torch.cat(list(hidden)).unflatten(0, (-1, self._frames(self.window)))
        hidden_WFD = hidden_WFD.to(self.device, self.model.dtype)
        for layer in self.stack.layers[start:]:
            hidden_WFD = layer(hidden_WFD, None)
        return self._whole(self.norm(hidden_WFD), n_samples)

    @property
    def stack(self) -> Any:
        return self.model

    @property
    def norm(self) -> nn.Module:
        last: nn.Module = self.model.layer_norm
        return last

    def _whole(self, hidden_WFD: Tensor, n_samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Windows put together to clips, without the frames of the silence that fills up the last window."""
        frames, lengths = hidden_WFD.flatten(0, 1), [self.frames(count) for count in n_samples]
        clips = frames.split([self.cost(count) for count in n_samples])
        whole = [clip_FD[:length] for clip_FD, length in zip(clips, lengths, strict=True)]
        return _padded(whole), torch.tensor(lengths, device=self.device)


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm over time whose statistics ignore padding (one channel a group, as the wav2vec 2.0 family has it)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        assert norm.num_groups == norm.num_channels
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.lengths_B = torch.empty(0)  # set before each forward; an attribute, so that a deep copy has its own

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input_BCT over the first `lengths_B` steps of each row."""
        count_B11 = self.lengths_B[:, None, None]
        values_BCT = input.float()
        valid_B1T = _valid(self.lengths_B, input.shape[-1])[:, None].float()
        mean_BC1 = (values_BCT * valid_B1T).sum(-1, keepdim=True) / count_B11
        centred_BCT = (values_BCT - mean_BC1) * valid_B1T
        variance_BC1 = centred_BCT.square().sum(-1, keepdim=True) / count_B11
        scaled_BCT = (values_BCT - mean_BC1) * torch.rsqrt(variance_BC1 + self.eps)
        return (scaled_BCT * self.weight[:, None] + self.bias[:, None]).to(input.dtype)


class MaskedConv1d(nn.Conv1d):
    """A convolution over time that reads zeros beyond a clip's end, as it does when the clip is alone."""

    def __init__(self, conv: nn.Conv1d) -> None:
        sizes = (conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups)
        super().__init__(conv.in_channels, conv.out_channels, *sizes, bias=conv.bias is not None)
        self.weight, self.bias = conv.weight, conv.bias
        self.lengths_B = torch.empty(0)  # as in MaskedGroupNorm

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the first `lengths_B` steps of each row of input_BCT."""
        valid_BT = _valid(self.lengths_B, input.shape[-1])
        return super().forward(input.masked_fill(~valid_BT[:, None], 0.0))


def _cut(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _padded(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _valid(lengths_B: Tensor, size: int) -> Tensor:
    """Which of `size` steps lie within each row's length, [B, size]."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]
