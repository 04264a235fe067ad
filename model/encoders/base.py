"""What every speech encoder offers: the frames of clips, at once or in two steps, the first of which never changes.

Legend: B clips, F frames, D width, W windows.
"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.corpus.schema import SAMPLE_RATE


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

    @torch.no_grad()
    def states(self, clip: np.ndarray, starts: Collection[int]) -> dict[int, Tensor]:
        """What layers read of a clip by itself, in one pass; it is the same for ever where all below is frozen.

        Args:
            clip: a waveform, see `forward`.
            starts: the layers, at least 1 each; 0 stands for what follows the last one.

        Returns:
            For each, hidden_FD of all `cost(len(clip))` frames that are computed; for 0, the `frames(len(clip))` that
            `forward` returns.
        """
        stack, layers, found = self.stack, self.stack.layers, dict[int, Tensor]()

        def hold(start: int, output: Any) -> None:
            hidden_WFD: Tensor = output[0] if isinstance(output, tuple) else output
            found[start] = hidden_WFD.flatten(0, 1).clone()  # what comes later may write into it

        hooks = [
            layers[start - 1].register_forward_hook(lambda layer, inputs, output, start=start: hold(start, output))
            for start in set(starts) - {0}
        ]
        if 0 not in starts:
            stack.layers = layers[: max(starts)]  # the others would be computed for nothing
        try:
            frames_BFD, lengths_B = self([clip])
        finally:
            stack.layers = layers
            for hook in hooks:
                hook.remove()
        return found | ({0: frames_BFD[0, : lengths_B[0]]} if 0 in starts else {})

    def rest(self, hidden: Sequence[Tensor], n_samples: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
        """Compute the layers from `start` on, and what follows them.

        Args:
            hidden: of each clip, what `states` says.
            n_samples: of each clip.
            start: the first layer that is computed.

        Returns:
            What `forward` does for the clips.
        """
        raise NotImplementedError

    @property
    def stack(self) -> Any:
        """The module whose `layers` are the transformer's."""
        raise NotImplementedError

    @property
    def norm(self) -> nn.Module:
        """What follows the last layer."""
        raise NotImplementedError

    @property
    def frozen_layers(self) -> int:
        """The layers below all parameters that train; 0 if one of what comes before the first layer does."""
        layers = self.stack.layers
        trains = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
        count = trains.index(True) if any(trains) else len(trains)
        above = {id(parameter) for module in (*layers[count:], self.norm) for parameter in module.parameters()}
        below = (parameter for parameter in self.parameters() if id(parameter) not in above)
        return 0 if any(parameter.requires_grad for parameter in below) else count

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
