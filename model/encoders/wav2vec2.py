"""HuBERT, wav2vec 2.0 and WavLM: a padded batch of clips with a mask that no layer looks beyond.

The conformers in `conformer.py` share the base class.

Legend: B clips, N samples, F frames, D width, H attention heads of all clips.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask

from model.compat import freeze_feature_encoder
from model.encoders.base import SpeechEncoder, Transformer, hidden_states
from model.encoders.masked_layers import MaskedConv1d, MaskedGroupNorm, pad_rows, valid_mask
from model.runtime.device import on_device


class PaddedBatchEncoder(SpeechEncoder):
    """An encoder of the wav2vec 2.0 family, which reads all clips in one padded batch with a mask."""

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        super().__init__(model, extractor)
        # SpecAugment and layer drop would draw from global random states in an order that depends on the batch.
        # SpecAugment itself stays on, for the masks that `forward` is given.
        config = model.config
        config.mask_time_prob = config.mask_feature_prob = config.layerdrop = 0.0
        config.apply_spec_augment = True
        if not hasattr(model, "masked_spec_embed"):  # pre-trained without SpecAugment: a hidden frame is zero
            zeros_D = torch.zeros(self.state_width, device=model.device)
            model.register_buffer("masked_spec_embed", zeros_D, persistent=False)
        positions = getattr(model.encoder, "embed_positions", None)
        if positions is not None and hasattr(positions, "pe"):
            positions.register_buffer("exact", positions.pe, persistent=False)

    @classmethod
    def unsupported_reason(cls, config: PretrainedConfig, extractor: SequenceFeatureExtractor) -> str | None:
        if getattr(config, "add_adapter", False):
            return (
                "its convolutional adapter (add_adapter) reads a clip's padding as if it were audio; set add_adapter "
                "to false in its config.json to use the frames before it"
            )
        return super().unsupported_reason(config, extractor)

    def _encode(self, clips: list[np.ndarray], time_masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Sequence[int]]:
        lengths = [self._count_frames(len(clip)) for clip in clips]
        inputs, valid = self._model_inputs(clips, on_device(lengths, self.device))
        hide = {}
        if time_masks is not None:
            hide["mask_time_indices"] = on_device(pad_rows(list(map(torch.as_tensor, time_masks))), self.device)
        self._reset_position_cache()
        inputs = on_device(inputs, self.device, self.model.dtype)
        hidden_BFD: Tensor = self.model(inputs, attention_mask=valid.long(), **hide).last_hidden_state
        return hidden_BFD, lengths

    def _upper_layers(self, hidden_WFD: Tensor, lengths: Sequence[int], start: int) -> Tensor:
        lengths_W = on_device(lengths, self.device)
        valid_WF = valid_mask(lengths_W, hidden_WFD.shape[1])
        self._reset_position_cache()
        arguments = self._layer_arguments(hidden_WFD, valid_WF, lengths_W)
        for layer in self.transformer.layers[start:]:
            hidden_WFD = hidden_states(layer(hidden_WFD, **arguments))
        normed_WFD: Tensor = self.final_norm(hidden_WFD)
        return normed_WFD

    def _clip_frames(self, hidden_WFD: Tensor, lengths: Sequence[int], n_samples: Sequence[int]) -> Tensor:
        lengths_W = on_device(lengths, self.device)
        return hidden_WFD * valid_mask(lengths_W, hidden_WFD.shape[1])[:, :, None]

    @property
    def transformer(self) -> Transformer:
        transformer: Transformer = self.model.encoder
        return transformer

    def _model_inputs(self, clips: list[np.ndarray], lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the padded input of the model and the mask of what is not padding.

        Args:
            clips: waveforms of at least `min_samples`.
            lengths_B: their numbers of frames.
        """
        raise NotImplementedError

    def _layer_arguments(self, hidden_BFD: Tensor, valid_BF: Tensor, lengths_B: Tensor) -> dict[str, Tensor | None]:
        """Return what the model passes to each layer besides the hidden states."""
        return {"attention_mask": create_bidirectional_mask(self.model.config, hidden_BFD, valid_BF)}

    def _reset_position_cache(self) -> None:
        """Drop the position embeddings that transformers caches between batches.

        They are rounded to the precision of the batch that they were computed for.
        """
        positions = getattr(self.model.encoder, "embed_positions", None)
        if positions is not None and hasattr(positions, "exact"):
            positions.pe = positions.exact
        elif positions is not None:
            positions.cached_sequence_length = None


class WaveformEncoder(PaddedBatchEncoder):
    """HuBERT and wav2vec 2.0: convolutions over the waveform, then a transformer."""

    input_name = "input_values"

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        super().__init__(model, extractor)
        self.strides = list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))
        self.min_samples = 1
        for kernel, stride in reversed(self.strides):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        freeze_feature_encoder(model.feature_extractor)
        self.norms: list[MaskedGroupNorm] = []
        self.convolutions: list[MaskedConv1d] = []  # over frames, where the model does not zero the padding itself
        if model.config.feat_extract_norm == "group":
            first = model.feature_extractor.conv_layers[0]
            first.layer_norm = MaskedGroupNorm(first.layer_norm)
            self.norms.append(first.layer_norm)
        positions = model.encoder.pos_conv_embed
        if getattr(positions, "batch_norm", None) is not None:  # it shifts the zeros of the padding
            positions.conv = MaskedConv1d(positions.conv)
            self.convolutions.append(positions.conv)

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.model.encoder.layer_norm if self.model.config.do_stable_layer_norm else nn.Identity()
        return norm

    def _drop_final_norm(self) -> None:
        if not isinstance(self.final_norm, nn.Identity):  # otherwise the norm precedes the first layer
            self.model.encoder.layer_norm = nn.Identity()

    def _count_frames(self, n_samples: int) -> int:
        for kernel, stride in self.strides:
            n_samples = (n_samples - kernel) // stride + 1
        return n_samples

    def _model_inputs(self, clips: list[np.ndarray], lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        counts_B = on_device([len(clip) for clip in clips], self.device)
        kernel, stride = self.strides[0]
        for norm in self.norms:
            norm.lengths_B = (counts_B - kernel) // stride + 1
        for convolution in self.convolutions:
            convolution.lengths_B = lengths_B
        samples_BN = pad_rows([torch.as_tensor(self._extract(clip)) for clip in clips])
        return samples_BN, valid_mask(counts_B, samples_BN.shape[1])


class WavLMEncoder(WaveformEncoder):
    """WavLM: the first layer computes an attention bias from distances, and the other layers reuse it."""

    not_adaptable = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})

    def _layer_arguments(self, hidden_BFD: Tensor, valid_BF: Tensor, lengths_B: Tensor) -> dict[str, Tensor | None]:
        n_clips, n_frames = valid_BF.shape
        bias_HFF = self.model.encoder.layers[0].attention.compute_bias(n_frames, n_frames)
        return {"attention_mask": valid_BF.long(), "position_bias": bias_HFF.repeat(n_clips, 1, 1)}
