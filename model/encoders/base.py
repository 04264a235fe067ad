"""The interface of a speech encoder: clips in, frames out, and no clip's frames depend on the rest of the batch.

Each architecture has a subclass; `model/encoders/loading.py` lists them. An encoder also runs in two steps,
`layer_inputs` and `forward_from_layer`, so that the output of frozen lower layers can be cached.

Hidden states are counted as transformers does: 0 is the input of the first layer, and k is the output of layer k.

Legend: B clips, F frames, D width of the encoder, W rows that the transformer computes (clips, or windows of Whisper).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor

from data.corpus.schema import SAMPLE_RATE
from data.errors import ConfigError
from model.config import Layers
from model.encoders.masked_layers import pad_rows
from model.runtime.device import on_device

OUTPUT = -1  # the last hidden state as the model returns it: behind its final norm
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
    not_adaptable: ClassVar[frozenset[str]] = frozenset()  # linear layers whose weights the model reads without a call
    min_samples: int  # length of the shortest clip that yields a frame; shorter clips are padded with zeros to it

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        super().__init__()
        self.model = model
        self.extractor = extractor
        self.state_width: int = model.config.hidden_size  # of one hidden state
        self.n_layers: int = model.config.num_hidden_layers  # of the checkpoint; `set_layers` may drop the upper ones
        self.states: tuple[int, ...] = (OUTPUT,)  # the hidden states that `forward` returns side by side
        self.top = OUTPUT  # the hidden state that the model itself returns

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

    @property
    def width(self) -> int:
        """The width of the frames that `forward` returns."""
        return self.state_width * len(self.states)

    def set_layers(self, layers: Layers) -> None:
        """Choose the hidden states that `forward` returns, see `EncoderConfig.layers`; drop all layers above them.

        Raises:
            ConfigError: the encoder has fewer layers.
        """
        if layers == "last":
            return
        every = range(self.n_layers + 1)
        chosen = every if layers == "weighted" else [layers] if isinstance(layers, int) else layers
        if beyond := [index for index in chosen if index not in every]:
            raise ConfigError(
                f"model.encoder.layers: {beyond[0]} is no layer of this encoder ({self.model.config.model_type}), "
                f"which has {self.n_layers}; choose from 0 (the input of the first layer) to {self.n_layers}"
            )
        self.states = tuple(OUTPUT if index == self.n_layers else index for index in chosen)
        if OUTPUT not in self.states:
            self.top = max(self.states)
            self.transformer.layers = self.transformer.layers[: self.top]
            self._drop_final_norm()

    def num_frames(self, n_samples: int) -> int:
        """Return the number of frames that a clip of `n_samples` at 16 kHz yields: at least one."""
        return self._count_frames(max(n_samples, self.min_samples))

    @property
    def frame_rate(self) -> float:
        """The number of frames for a second of audio."""
        return round(self.num_frames(1000 * SAMPLE_RATE) / 1000, 1)

    def num_computed_frames(self, n_samples: int) -> int:
        """Return the number of frames that the transformer computes for a clip, padding to a fixed window included."""
        return self.num_frames(n_samples)

    def forward(
        self, clips: Sequence[np.ndarray], time_masks: Sequence[np.ndarray] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Encode clips.

        Args:
            clips: float32 mono waveforms at 16 kHz of any lengths.
            time_masks: the frames that SpecAugment hides (Park et al., 2019, arXiv 1904.08779), in training only: a
                bool array of `num_frames(len(clip))` for each clip. The caller draws them, because a draw in here
                would depend on the batch.

        Returns:
            frames_BFD in the dtype of the weights, zero beyond each clip's end, and their lengths in frames. The
            hidden states that `set_layers` chose are side by side in D.
        """
        padded = [self._pad(clip) for clip in clips]
        if time_masks is not None:
            assert [len(mask) for mask in time_masks] == [self._count_frames(len(clip)) for clip in padded]
        with self._kept(set(self.states) - {self.top}) as kept:
            kept[self.top], lengths = self._encode(padded, time_masks)
        return self._side_by_side(kept, {}, lengths, [len(clip) for clip in padded])

    @torch.no_grad()
    def layer_inputs(self, clip: np.ndarray, indices: Collection[int]) -> dict[int, Tensor]:
        """Return hidden states of a clip that is encoded alone, from one pass over the encoder.

        Args:
            clip: a waveform, see `forward`.
            indices: which ones. Index k is also what the layer with k layers below it reads; OUTPUT is what the model
                returns.

        Returns:
            For each index hidden_FD of all `num_computed_frames(len(clip))` frames, of which the clip's own are the
            first `num_frames(len(clip))`.
        """
        transformer, layers = self.transformer, self.transformer.layers
        if self.top not in indices:
            transformer.layers = layers[: max(1, *indices)]  # do not compute layers whose output nothing reads
        try:
            with self._kept(set(indices) - {self.top}) as kept:
                top_WFD, _ = self._encode([self._pad(clip)], None)
        finally:
            transformer.layers = layers
        kept[self.top] = top_WFD
        return {index: kept[index].flatten(0, 1)[: self.num_computed_frames(len(clip))] for index in indices}

    def forward_from_layer(
        self,
        hidden: Sequence[Tensor],
        n_samples: Sequence[int],
        start: int,
        lower: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> tuple[Tensor, list[int]]:
        """Compute the layers from `start` on and what follows them.

        Args:
            hidden: for each clip, what `layer_inputs` returns for `start`.
            n_samples: for each clip, its length.
            start: index of the first layer that is computed.
            lower: for each of `states` below `start`, its frames_FD of each clip.

        Returns:
            frames_BFD and lengths, as `forward` does for the clips.
        """
        rows = self._rows(hidden)
        hidden_WFD, lengths = on_device(pad_rows(rows), self.device, self.model.dtype), [len(row) for row in rows]
        with self._kept({index for index in self.states if index > start} - {self.top}) as kept:
            kept[self.top] = self._upper_layers(hidden_WFD, lengths, start)
        below = {index: pad_rows(frames).to(hidden_WFD) for index, frames in (lower or {}).items()}
        return self._side_by_side({start: hidden_WFD} | kept, below, lengths, n_samples)

    @property
    def transformer(self) -> Transformer:
        """The module whose `layers` are the transformer's; by default the model itself."""
        transformer: Transformer = self.model
        return transformer

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
        set_dropout(self, probability)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.model.device
        return device

    def _pad(self, clip: np.ndarray) -> np.ndarray:
        return np.pad(clip, (0, max(0, self.min_samples - len(clip))))

    @contextmanager
    def _kept(self, indices: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Keep inner hidden states of the pass within the block, as hidden_WFD by index."""
        kept: dict[int, Tensor] = {}

        def keep(index: int, output: LayerOutput) -> None:
            kept[index] = hidden_states(output).clone()  # a later layer may write into its input

        layers = self.transformer.layers
        hooks = [
            layers[0].register_forward_pre_hook(lambda _, inputs: keep(0, inputs[0]))
            if index == 0
            else layers[index - 1].register_forward_hook(lambda _, __, output, index=index: keep(index, output))
            for index in indices
        ]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    def _side_by_side(
        self,
        computed: Mapping[int, Tensor],
        below: Mapping[int, Tensor],
        lengths: Sequence[int],
        n_samples: Sequence[int],
    ) -> tuple[Tensor, list[int]]:
        """Return what `forward` does.

        Args:
            computed: hidden_WFD by index.
            below: frames_BFD by index of states that were not computed.
            lengths: the number of frames of each row W.
            n_samples: the length of each clip.
        """
        frames = [
            below[index] if index in below else self._clip_frames(computed[index], lengths, n_samples)
            for index in self.states
        ]
        joined = frames[0] if len(frames) == 1 else torch.cat(frames, dim=-1)
        return joined, [self.num_frames(count) for count in n_samples]

    def _drop_final_norm(self) -> None:
        """Remove what follows the last layer."""
        raise NotImplementedError

    def _count_frames(self, n_samples: int) -> int:
        """Return the number of frames of a clip that is at least `min_samples` long."""
        raise NotImplementedError

    def _encode(self, clips: list[np.ndarray], time_masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Sequence[int]]:
        """Encode clips that are at least `min_samples` long; return hidden_WFD and the number of frames of each row."""
        raise NotImplementedError

    def _rows(self, hidden: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the rows that the transformer computes from the frames of clips: one for each clip, or several."""
        return hidden

    def _upper_layers(self, hidden_WFD: Tensor, lengths: Sequence[int], start: int) -> Tensor:
        """Compute the layers from `start` on, and what follows them, over rows of these lengths."""
        raise NotImplementedError

    def _clip_frames(self, hidden_WFD: Tensor, lengths: Sequence[int], n_samples: Sequence[int]) -> Tensor:
        """Return frames_BFD of clips, zero beyond each clip's end, from rows of these lengths."""
        raise NotImplementedError

    def _extract(self, clip: np.ndarray) -> np.ndarray:
        """Return the model's input for one clip, in float32 also under autocast.

        An extractor that normalises a padded batch computes its statistics over the padding, so clips are extracted
        one at a time.
        """
        with torch.autocast("cpu", enabled=False):
            features: np.ndarray = self.extractor(clip, sampling_rate=SAMPLE_RATE)[self.input_name][0]
        return features


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout of a model: of its modules, and of their attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, probability)


def hidden_states(output: LayerOutput) -> Tensor:
    """Return the hidden states of a layer's output."""
    return output[0] if isinstance(output, tuple) else output
