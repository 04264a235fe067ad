"""Speech encoders behind one interface: clips in, frames and their lengths out, independent of what else is batched.

Legend: B clips, N samples, F frames, D width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from data.errors import ConfigError, reason
from data.schema import SAMPLE_RATE


class SpeechEncoder(nn.Module):
    """A pretrained encoder. Subclasses turn clips into frames that depend on their own samples only."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.extractor = extractor
        self.width: int = model.config.hidden_size

    def frames(self, n_samples: int) -> int:
        """The number of frames that a clip of `n_samples` at 16 kHz yields."""
        raise NotImplementedError

    def cost(self, n_samples: int) -> int:
        """The number of frames that are computed for them."""
        return self.frames(n_samples)

    def forward(self, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            clips: float32 mono waveforms at 16 kHz, each of its own length.

        Returns:
            frames_BFD, zero beyond each clip's end, and lengths_B.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device


class WaveEncoder(SpeechEncoder):
    """HuBERT, wav2vec 2.0 and WavLM: convolutions over the waveform, then a transformer."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model, extractor)
        # SpecAugment and layer drop would draw from global generators in an order that depends on the batch.
        model.config.apply_spec_augment = False
        model.config.layerdrop = 0.0
        model.feature_extractor._freeze_parameters()
        first = model.feature_extractor.conv_layers[0]
        self.norm = None
        if model.config.feat_extract_norm == "group":
            first.layer_norm = self.norm = MaskedGroupNorm(first.layer_norm)

    def frames(self, n_samples: int) -> int:
        return int(self.model._get_feat_extract_output_lengths(torch.tensor(n_samples)))

    def forward(self, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        lengths = [self.frames(len(clip)) for clip in clips]
        samples_BN = torch.zeros(len(clips), max(map(len, clips)))
        for row, clip in enumerate(clips):
            # One clip at a time: an extractor that normalises a padded batch lets its neighbours into the statistics.
            values = self.extractor(clip, sampling_rate=SAMPLE_RATE)["input_values"][0]
            samples_BN[row, : len(clip)] = torch.as_tensor(values)
        counts_B = torch.tensor([len(clip) for clip in clips], device=self.device)
        mask_BN = torch.arange(samples_BN.shape[1], device=self.device) < counts_B[:, None]
        if self.norm is not None:
            kernel, stride = self.model.config.conv_kernel[0], self.model.config.conv_stride[0]
            self.norm.lengths_B = (counts_B - kernel) // stride + 1
        hidden_BFD = self.model(
            samples_BN.to(self.device, self.model.dtype), attention_mask=mask_BN.long()
        ).last_hidden_state
        return _masked(hidden_BFD, torch.tensor(lengths, device=self.device))


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm over time whose statistics ignore padding (one channel a group, as the wav2vec 2.0 family has it)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        assert norm.num_groups == norm.num_channels
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.lengths_B = torch.empty(0)  # set before each forward

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input_BCT over the first `lengths_B` steps of each row."""
        count_B11 = self.lengths_B[:, None, None]
        values_BCT = input.float()
        valid_B1T = (torch.arange(input.shape[-1], device=input.device) < count_B11).float()
        mean_BC1 = (values_BCT * valid_B1T).sum(-1, keepdim=True) / count_B11
        centred_BCT = (values_BCT - mean_BC1) * valid_B1T
        variance_BC1 = centred_BCT.square().sum(-1, keepdim=True) / count_B11
        scaled_BCT = (values_BCT - mean_BC1) * torch.rsqrt(variance_BC1 + self.eps)
        return (scaled_BCT * self.weight[:, None] + self.bias[:, None]).to(input.dtype)


class MelEncoder(SpeechEncoder):
    """Whisper's encoder: a log-mel window of fixed length; longer clips are read window by window."""

    def __init__(self, model: Any, extractor: Any) -> None:
        encoder = model.get_encoder()
        super().__init__(encoder, extractor)
        encoder.layerdrop = 0.0
        for convolution in (encoder.conv1, encoder.conv2):
            convolution.requires_grad_(False)
        self.window: int = extractor.n_samples  # samples
        self.samples_per_frame: int = extractor.hop_length * 2  # the second convolution halves the mel rate

    def frames(self, n_samples: int) -> int:
        return -(-n_samples // self.samples_per_frame)

    def cost(self, n_samples: int) -> int:
        windows = -(-n_samples // self.window)  # each is computed whole
        return windows * self.frames(self.window)

    def forward(self, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        pieces = [clip[start : start + self.window] for clip in clips for start in range(0, len(clip), self.window)]
        mels = [self.extractor(piece, sampling_rate=SAMPLE_RATE)["input_features"][0] for piece in pieces]
        mels_WMT = torch.as_tensor(np.stack(mels)).to(self.device, self.model.dtype)
        hidden_WFD = self.model(mels_WMT).last_hidden_state
        kept = [hidden[: self.frames(len(piece))] for hidden, piece in zip(hidden_WFD, pieces, strict=True)]
        windows = [-(-len(clip) // self.window) for clip in clips]
        whole = [torch.cat(part) for part in _runs(kept, windows)]
        lengths_B = torch.tensor([len(frames) for frames in whole], device=self.device)
        return nn.utils.rnn.pad_sequence(whole, batch_first=True), lengths_B


def _runs(items: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    """Cut a list into consecutive runs of the given lengths."""
    source = iter(items)
    return [[next(source) for _ in range(count)] for count in counts]


def _masked(hidden_BFD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    hidden_BFD = hidden_BFD[:, : int(lengths_B.max())]
    valid_BF = torch.arange(hidden_BFD.shape[1], device=hidden_BFD.device) < lengths_B[:, None]
    return hidden_BFD * valid_BF[:, :, None], lengths_B


ENCODERS: dict[str, type[SpeechEncoder]] = {
    "hubert": WaveEncoder,
    "wav2vec2": WaveEncoder,
    "wavlm": WaveEncoder,
    "whisper": MelEncoder,
}


def encoder_kind(path: str) -> str:
    """The model type of an encoder, read from its configuration alone.

    Raises:
        ConfigError: there is no configuration, or the kind is not known to be independent of its batch.
    """
    try:
        kind: str = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.encoder.path: cannot load an encoder from {path}: {reason(error)}") from None
    if kind not in ENCODERS:
        raise ConfigError(
            f"model.encoder.path: {path} is a {kind} model, which is not known to give a clip the same frames in "
            f"every batch; use one of {', '.join(ENCODERS)}"
        )
    return kind


@functools.lru_cache(maxsize=2)
def load_encoder(path: str, device: str) -> SpeechEncoder:
    """Load an encoder once per process; trials share its frozen weights.

    Args:
        path: Hugging Face id or local folder.
        device: e.g. "cpu" or "cuda".

    Raises:
        ConfigError: nothing can be loaded from there, or see `encoder_kind`.
    """
    kind = encoder_kind(path)
    try:
        extractor = AutoFeatureExtractor.from_pretrained(path)
        model = AutoModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.encoder.path: cannot load an encoder from {path}: {reason(error)}") from None
    return ENCODERS[kind](model, extractor).to(device).eval()
