"""The interface of a speech encoder: clips in, frames out, and no clip's frames depend on the rest of the batch.

Each architecture has a subclass; `model/encoders/loading.py` lists them. An encoder also runs in two steps,
`layer_inputs` and `forward_from_layer`, so that the output of frozen lower layers can be cached.

Legend: B clips, F frames, D width of the encoder, W rows that the transformer computes (clips, or windows of Whisper).
"""

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor

from data.corpus.schema import SAMPLE_RATE
from data.errors import ConfigError

LayerOutput = Tensor | tuple[Tensor, ...]  # hidden states, alone or followed by attention weights


class Transformer(Protocol):
    """The part of a transformers model that holds the transformer's layers."""

    layers: nn.ModuleList


class SpeechEncoder(nn.Module):
    """A pretrained speech encoder.

    Args:
        model: the model of transformers, whose weights are used and whose settings are changed in place.
        extractor: its feature extractor.
    """

    input_name: ClassVar[str]  # the model's input, by the name that the feature extractor gives it
    min_samples: int  # length of the shortest clip that yields a frame; shorter clips are padded with zeros to it

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        super().__init__()
        self.model = model
        self.extractor = extractor
        self.width: int = model.config.hidden_size

    @classmethod
    def unsupported_reason(cls, config: PretrainedConfig, extractor: SequenceFeatureExtractor) -> str | None:
        """Return why a checkpoint cannot be used and what to do, or None if it can. Reads no weights."""
        if extractor.model_input_names[0] != cls.input_name:
            return (
                f"its feature extractor {type(extractor).__name__} yields {extractor.model_input_names[0]}, but the "
                f"model reads {cls.input_name}; use the preprocessor_config.json that belongs to the model"
            )
        if extractor.sampling_rate != SAMPLE_RATE:
            return f"it reads audio at {extractor.sampling_rate} Hz; use an encoder for {SAMPLE_RATE} Hz"
        return None

    def set_context(self, context: Literal["window", "clip"]) -> None:
        """Set what is computed for a clip, see `EncoderConfig.context`.

        Raises:
            ConfigError: the encoder has no window.
        """
        if context != "window":
            raise ConfigError(
                f"model.encoder.context: {context} is for Whisper, and this encoder ({self.model.config.model_type}) "
                "has no window, so it computes the clip's frames in any case; set window"
            )

    def num_frames(self, n_samples: int) -> int:
        """Return the number of frames that a clip of `n_samples` at 16 kHz yields: at least one."""
        return self._count_frames(max(n_samples, self.min_samples))

    def num_computed_frames(self, n_samples: int) -> int:
        """Return the number of frames that the transformer computes for a clip, padding to a fixed window included."""
        return self.num_frames(n_samples)

    def forward(
        self, clips: Sequence[np.ndarray], time_masks: Sequence[np.ndarray] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            clips: float32 mono waveforms at 16 kHz of any lengths.
            time_masks: the frames that SpecAugment hides (Park et al., 2019, arXiv 1904.08779), in training only: a
                bool array of `num_frames(len(clip))` for each clip. The caller draws them, because a draw in here
                would depend on the batch.

        Returns:
            frames_BFD in the dtype of the weights, zero beyond each clip's end, and lengths_B in frames.
        """
        padded = [np.pad(clip, (0, max(0, self.min_samples - len(clip)))) for clip in clips]
        if time_masks is not None:
            assert [len(mask) for mask in time_masks] == [self._count_frames(len(clip)) for clip in padded]
        return self._encode(padded, time_masks)

    @torch.no_grad()
    def layer_inputs(self, clip: np.ndarray, starts: Collection[int]) -> dict[int, Tensor]:
        """Return what some layers read when a clip is encoded alone, from one pass over the encoder.

        Args:
            clip: a waveform, see `forward`.
            starts: indices of layers, each at least 1. Index 0 asks for the output of the encoder instead.

        Returns:
            For each index hidden_FD of all `num_computed_frames(len(clip))` frames; for index 0, the
            `num_frames(len(clip))` frames that `forward` returns.
        """
        transformer, layers = self.transformer, self.transformer.layers
        inputs: dict[int, Tensor] = {}

        def keep_output(start: int, output: LayerOutput) -> None:
            # A later layer may write into its input, so the tensor is copied.
            inputs[start] = hidden_states(output).flatten(0, 1)[: self.num_computed_frames(len(clip))].clone()

        hooks = [
            layers[start - 1].register_forward_hook(lambda _, __, output, start=start: keep_output(start, output))
            for start in set(starts) - {0}
        ]
        if 0 not in starts:
            transformer.layers = layers[: max(starts)]  # do not compute layers whose output nothing reads
        try:
            frames_BFD, lengths_B = self([clip])
        finally:
            transformer.layers = layers
            for hook in hooks:
                hook.remove()
        return inputs | ({0: frames_BFD[0, : lengths_B[0]]} if 0 in starts else {})

    def forward_from_layer(
        self, hidden: Sequence[Tensor], n_samples: Sequence[int], start: int
    ) -> tuple[Tensor, Tensor]:
        """Compute the layers from `start` on and what follows them.

        Args:
            hidden: for each clip, what `layer_inputs` returns for `start`.
            n_samples: for each clip, its length.
            start: index of the first layer that is computed.

        Returns:
            frames_BFD and lengths_B, as `forward` does for the clips.
        """
        raise NotImplementedError

    @property
    def transformer(self) -> Transformer:
        """The module whose `layers` are the transformer's."""
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        """The module that follows the last layer."""
        raise NotImplementedError

    @property
    def frozen_layers(self) -> int:
        """The number of layers below everything that trains; 0 if a parameter before the first layer trains."""
        layers = self.transformer.layers
        trains = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
        count = trains.index(True) if any(trains) else len(trains)
        above = {id(parameter) for module in (*layers[count:], self.final_norm) for parameter in module.parameters()}
        below = (parameter for parameter in self.parameters() if id(parameter) not in above)
        return 0 if any(parameter.requires_grad for parameter in below) else count

    def train(self, mode: bool = True) -> "SpeechEncoder":
        """Switch to training, except batch norms: with statistics of the batch a clip would depend on the others."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def set_dropout(self, probability: float) -> None:
        """Set the probability of every dropout; the checkpoint holds those of its pre-training."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
            for name, value in vars(module).items():
                if name.endswith("dropout") and isinstance(value, float):
                    setattr(module, name, probability)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.model.device
        return device

    def _count_frames(self, n_samples: int) -> int:
        """Return the number of frames of a clip that is at least `min_samples` long."""
        raise NotImplementedError

    def _encode(self, clips: list[np.ndarray], time_masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Tensor]:
        """Encode clips that are at least `min_samples` long, see `forward`."""
        raise NotImplementedError

    def _extract(self, clip: np.ndarray) -> np.ndarray:
        """Return the model's input for one clip, in float32 also under autocast.

        An extractor that normalises a padded batch computes its statistics over the padding, so clips are extracted
        one at a time.
        """
        with torch.autocast("cpu", enabled=False):
            features: np.ndarray = self.extractor(clip, sampling_rate=SAMPLE_RATE)[self.input_name][0]
        return features


def hidden_states(output: LayerOutput) -> Tensor:
    """Return the hidden states of a layer's output."""
    return output[0] if isinstance(output, tuple) else output
