"""Whisper's encoder without its fixed 30 seconds of output.

Legend: B clips, F frames, D width, W windows of all clips, M mel bands, T mel steps.
"""

from collections.abc import Sequence
from itertools import chain
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask

from model.encoders.base import SpeechEncoder
from model.encoders.masked_layers import pad_rows, valid_mask
from model.runtime.device import on_device

Pieces = TypeVar("Pieces", np.ndarray, range)


class WhisperEncoder(SpeechEncoder):
    """Whisper: each window of fixed length is computed with its padding, and a longer clip has several windows.

    Frames that lie wholly in the padding are removed afterwards, or, with the context "clip", not computed:
    convolutions and positions are those of the window, but no frame attends to the padding (as in Ultravox's Whisper).
    """

    input_name = "input_features"
    min_samples = 1
    pooled: ClassVar[int] = 1  # frames of the transformer that make one frame of the output

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        encoder = model.get_encoder()
        super().__init__(encoder, extractor)
        encoder.layerdrop = 0.0
        for part in (encoder.conv1, encoder.conv2, encoder.embed_positions):  # positions are fixed sinusoids
            part.requires_grad_(False)
        self.window: int = extractor.n_samples  # samples
        self.samples_per_frame: int = extractor.hop_length * 2  # the second convolution halves the rate
        self.context: Literal["window", "clip"] = "window"

    @classmethod
    def unsupported_reason(cls, config: PretrainedConfig, extractor: SequenceFeatureExtractor) -> str | None:
        if getattr(extractor, "dither", 0.0) != 0.0:
            return (
                "its feature extractor adds noise (dither), drawn in an order that depends on the batch; set dither "
                "to 0 in its preprocessor_config.json"
            )
        return super().unsupported_reason(config, extractor)

    def set_context(self, context: Literal["window", "clip"]) -> None:
        self.context = context

    def num_computed_frames(self, n_samples: int) -> int:
        n_samples = max(n_samples, self.min_samples)
        if self.context == "clip":
            return self._transformer_frames(n_samples)
        return -(-n_samples // self.window) * self._transformer_frames(self.window)

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.model.layer_norm
        return norm

    def _drop_final_norm(self) -> None:
        self.model.layer_norm = nn.Identity()

    def _rows(self, hidden: Sequence[Tensor]) -> Sequence[Tensor]:
        return [window_FD for clip_FD in hidden for window_FD in clip_FD.split(self._transformer_frames(self.window))]

    def _upper_layers(self, hidden_WFD: Tensor, lengths: Sequence[int], start: int) -> Tensor:
        lengths_W = on_device(lengths, self.device)
        mask = None  # where no window is shorter than the others
        if min(lengths) < hidden_WFD.shape[1]:
            valid_WF = valid_mask(lengths_W, hidden_WFD.shape[1])
            mask = create_bidirectional_mask(self.model.config, hidden_WFD, valid_WF)
        for layer in self.transformer.layers[start:]:
            hidden_WFD = layer(hidden_WFD, mask)
        normed_WFD: Tensor = self.final_norm(hidden_WFD)
        return normed_WFD

    def _count_frames(self, n_samples: int) -> int:
        return self._transformer_frames(n_samples) // self.pooled

    def _transformer_frames(self, n_samples: int) -> int:
        return -(-n_samples // self.samples_per_frame)

    def _encode(self, clips: list[np.ndarray], time_masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Sequence[int]]:
        windows = chain(*(cut(clip, self.window) for clip in clips))
        mels = [self._extract(window) for window in windows]
        if time_masks is not None:
            masks = chain(*(cut(mask, self._count_frames(self.window)) for mask in time_masks))
            steps = 2 * self.pooled  # mel steps of a frame
            for mel_MT, mask in zip(mels, masks, strict=False):  # a last window may be too short for a frame
                mel_MT[:, : steps * len(mask)][:, np.repeat(mask, steps)] = 0.0
        if self.context == "clip":
            return self._encode_clips(mels, [len(clip) for clip in clips])
        mels_WMT = on_device(np.stack(mels), self.device, self.model.dtype)
        hidden_WFD: Tensor = self.model(mels_WMT).last_hidden_state
        return hidden_WFD, [hidden_WFD.shape[1]] * len(mels)

    def _encode_clips(self, mels: Sequence[np.ndarray], n_samples: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        """Compute the frames of clips from the mel steps of their windows."""
        lengths = [
            self._transformer_frames(len(piece)) for count in n_samples for piece in cut(range(count), self.window)
        ]
        # The frames of a clip read one mel step beyond its own: silence, or the end of the window.
        steps = [torch.as_tensor(mel_MT[:, : 2 * n + 1]).T for mel_MT, n in zip(mels, lengths, strict=True)]
        encoder, mels_WMT = self.model, on_device(pad_rows(steps), self.device, self.model.dtype).transpose(1, 2)
        size = max(lengths)
        hidden_WDT = F.gelu(encoder.conv1(mels_WMT))[:, :, : 2 * size]
        hidden_WFD = F.gelu(encoder.conv2(hidden_WDT)).transpose(1, 2) + encoder.embed_positions.weight[:size]
        hidden_WFD = F.dropout(hidden_WFD, encoder.dropout, encoder.training)
        return self._upper_layers(hidden_WFD, lengths, 0), lengths

    def _clip_frames(self, hidden_WFD: Tensor, lengths: Sequence[int], n_samples: Sequence[int]) -> Tensor:
        # The frames of the padding in the last window of each clip are left out.
        counts = [self.num_frames(count) for count in n_samples]
        rows = zip(hidden_WFD, lengths, strict=True)
        windows = torch.cat([window_FD[: length // self.pooled] for window_FD, length in rows])
        clips = windows.split([self.num_computed_frames(count) // self.pooled for count in n_samples])
        frames = [clip_FD[:count] for clip_FD, count in zip(clips, counts, strict=True)]
        return pad_rows(frames)


def cut(values: Pieces, size: int) -> list[Pieces]:
    """Cut an array or a range into pieces of `size`, of which the last may be shorter."""
    return [values[start : start + size] for start in range(0, len(values), size)]
