"""The families of speech encoders, each made independent of what else is in the batch.

Legend: B clips, N samples, F frames, D width, C channels, T steps of a convolution, M mel bands, W windows.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.schema import SAMPLE_RATE


class SpeechEncoder(nn.Module):
    """A pretrained encoder. Subclasses turn clips into frames that depend on their own samples only."""

    reads: ClassVar[str]  # what the model takes, by the name that its feature extractor gives it
    minimum: int  # samples of the shortest clip that yields a frame; shorter ones are filled with zeros to it

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.extractor = extractor
        self.width: int = model.config.hidden_size

    @classmethod
    def obstacle(cls, config: Any, extractor: Any) -> str | None:
        """Why a checkpoint cannot be used, and what would help; None when it can. Needs no weights."""
        if extractor.model_input_names[0] != cls.reads:
            return (
                f"its feature extractor {type(extractor).__name__} yields {extractor.model_input_names[0]}, the model "
                f"reads {cls.reads}; use the preprocessor_config.json that belongs to the model"
            )
        if extractor.sampling_rate != SAMPLE_RATE:
            return f"it reads audio at {extractor.sampling_rate} Hz; use one for {SAMPLE_RATE} Hz"
        return None

    def frames(self, n_samples: int) -> int:
        """The number of frames that a clip of `n_samples` at 16 kHz yields: at least one."""
        return self._frames(max(n_samples, self.minimum))

    def cost(self, n_samples: int) -> int:
        """The number of frames that are computed for them."""
        return self.frames(n_samples)

    def forward(self, clips: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            clips: float32 mono waveforms at 16 kHz, each of its own length.
            masks: which frames SpecAugment hides (Park et al., 2019, arXiv 1904.08779), in training only: one bool
                array of `frames(len(clip))` a clip. Drawn by the caller, since a draw here would follow the batch.

        Returns:
            frames_BFD in the dtype of the weights, zero beyond each clip's end, and lengths_B.
        """
        filled = [np.pad(clip, (0, max(0, self.minimum - len(clip)))) for clip in clips]
        if masks is not None:
            assert [len(mask) for mask in masks] == [self._frames(len(clip)) for clip in filled]
        return self._encode(filled, masks)

    def train(self, mode: bool = True) -> "SpeechEncoder":
        """Switch to training, except batch norms: statistics of the batch would let a clip's neighbours in."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def set_dropout(self, share: float) -> None:
        """Replace every dropout inside; the checkpoint's own shares are those of its pre-training."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
            for name, value in vars(module).items():
                if name.endswith("dropout") and isinstance(value, float):
                    setattr(module, name, share)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def _frames(self, n_samples: int) -> int:
        raise NotImplementedError

    def _encode(self, clips: list[np.ndarray], masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _features(self, clip: np.ndarray) -> np.ndarray:
        """One clip at a time: an extractor that normalises a padded batch lets neighbours into the statistics.

        Always in float32: mixed precision is for the model.
        """
        with torch.autocast("cpu", enabled=False):
            features: np.ndarray = self.extractor(clip, sampling_rate=SAMPLE_RATE)[self.reads][0]
        return features


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

    def _forget_positions(self) -> None:
        """Position embeddings are kept from batch to batch, rounded to the precision of an earlier one."""
        positions: Any = getattr(self.model.encoder, "embed_positions", None)
        if hasattr(positions, "exact"):
            positions.pe = positions.exact
        elif positions is not None:
            positions.cached_sequence_length = None

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


class ConformerEncoder(WaveEncoder):
    """wav2vec2-conformer: the convolution in each layer would read its neighbour's padding, which is not zero there."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model, extractor)
        model.encoder.pos_conv_embed.requires_grad_(False)  # part of the checkpoint, but never computed
        for layer in model.encoder.layers:
            layer.conv_module.depthwise_conv = MaskedConv1d(layer.conv_module.depthwise_conv)
            self.convolutions.append(layer.conv_module.depthwise_conv)


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
        hidden_WFD = self.model(mels_WMT).last_hidden_state
        kept = [hidden[: self._frames(len(piece))] for hidden, piece in zip(hidden_WFD, chain(*pieces), strict=True)]
        source = iter(kept)
        whole = [torch.cat([next(source) for _ in part]) for part in pieces]
        return _padded(whole), torch.tensor([len(frames) for frames in whole], device=self.device)


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
