"""Whisper's encoder without its fixed 30 seconds of output.

Legend: B clips, F frames, D width, W windows of all clips, M mel bands, T mel steps.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor

from model.encoders.base import SpeechEncoder, Transformer
from model.encoders.masked_layers import pad_rows


class WhisperEncoder(SpeechEncoder):
    """Whisper: each window of fixed length is computed with its padding, and a longer clip has several windows.

    Frames that lie wholly in the padding are removed afterwards.
    """

    input_name = "input_features"
    min_samples = 1

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        encoder = model.get_encoder()
        super().__init__(encoder, extractor)
        encoder.layerdrop = 0.0
        for part in (encoder.conv1, encoder.conv2, encoder.embed_positions):  # positions are fixed sinusoids
            part.requires_grad_(False)
        self.window: int = extractor.n_samples  # samples
        self.samples_per_frame: int = extractor.hop_length * 2  # the second convolution halves the rate

    @classmethod
    def unsupported_reason(cls, config: PretrainedConfig, extractor: SequenceFeatureExtractor) -> str | None:
        if getattr(extractor, "dither", 0.0) != 0.0:
            return (
                "its feature extractor adds noise (dither), drawn in an order that depends on the batch; set dither "
                "to 0 in its preprocessor_config.json"
            )
        return super().unsupported_reason(config, extractor)

    def num_computed_frames(self, n_samples: int) -> int:
        return -(-n_samples // self.window) * self._count_frames(self.window)

    @property
    def transformer(self) -> Transformer:
        transformer: Transformer = self.model
        return transformer

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.model.layer_norm
        return norm

    def forward_from_layer(
        self, hidden: Sequence[Tensor], n_samples: Sequence[int], start: int
    ) -> tuple[Tensor, Tensor]:
        hidden_WFD = torch.cat(list(hidden)).unflatten(0, (-1, self._count_frames(self.window)))
        hidden_WFD = hidden_WFD.to(self.device, self.model.dtype)
        for layer in self.transformer.layers[start:]:
            hidden_WFD = layer(hidden_WFD, None)
        return self._join_windows(self.final_norm(hidden_WFD), n_samples)

    def _count_frames(self, n_samples: int) -> int:
        return -(-n_samples // self.samples_per_frame)

    def _encode(self, clips: list[np.ndarray], time_masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Tensor]:
        windows = chain(*(cut(clip, self.window) for clip in clips))
        mels = [self._extract(window) for window in windows]
        if time_masks is not None:
            masks = chain(*(cut(mask, self._count_frames(self.window)) for mask in time_masks))
            for mel_MT, mask in zip(mels, masks, strict=True):
                mel_MT[:, : 2 * len(mask)][:, np.repeat(mask, 2)] = 0.0  # two mel steps make one frame
        mels_WMT = torch.as_tensor(np.stack(mels)).to(self.device, self.model.dtype)
        return self._join_windows(self.model(mels_WMT).last_hidden_state, [len(clip) for clip in clips])

    def _join_windows(self, hidden_WFD: Tensor, n_samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return frames_BFD and lengths_B from windows, without the frames of the padding in each last window."""
        lengths = [self.num_frames(count) for count in n_samples]
        clips = hidden_WFD.flatten(0, 1).split([self.num_computed_frames(count) for count in n_samples])
        frames = [clip_FD[:length] for clip_FD, length in zip(clips, lengths, strict=True)]
        return pad_rows(frames), torch.tensor(lengths, device=self.device)


def cut(values: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an array into pieces of `size`, of which the last may be shorter."""
    return [values[start : start + size] for start in range(0, len(values), size)]
