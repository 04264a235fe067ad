"""Whisper's encoder without its fixed 30 seconds of padding."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.encoders.base import SpeechEncoder
from model.encoders.masked_layers import _cut, _padded


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
