"""Speech encoders by Hugging Face id or folder; those that cannot be made independent of their batch are refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from data.errors import ConfigError, reason
from model.encoders.base import SpeechEncoder
from model.encoders.conformer import ConformerEncoder, FilterbankEncoder
from model.encoders.masked_layers import MaskedConv1d, MaskedGroupNorm
from model.encoders.wav2vec2 import WaveEncoder, WavLMEncoder
from model.encoders.whisper import MelEncoder
from model.runtime.memory import kept

__all__ = [
    "ENCODERS",
    "MaskedConv1d",
    "MaskedGroupNorm",
    "MelEncoder",
    "SpeechEncoder",
    "WaveEncoder",
    "encoder_kind",
    "load_encoder",
]

ENCODERS: dict[str, type[SpeechEncoder]] = {
    "hubert": WaveEncoder,
    "wav2vec2": WaveEncoder,
    "wavlm": WavLMEncoder,
    "wav2vec2-conformer": ConformerEncoder,
    "wav2vec2-bert": FilterbankEncoder,
    "whisper": MelEncoder,
}


def encoder_kind(path: str) -> str:
    """The model type of an encoder, read from its configuration alone.

    Raises:
        ConfigError: there is no configuration, or a clip's frames would depend on the batch.
    """
    kind: str = _checked(path)[0].model_type
    return kind


@kept
def load_encoder(path: str, device: str, dtype: str = "float32") -> SpeechEncoder:
    """Load an encoder; trials of a process share its frozen weights, see `kept`.

    Args:
        path: Hugging Face id or local folder.
        device: e.g. "cpu" or "cuda"; "meta" makes it from the configuration alone, without values.
        dtype: of the weights and frames, "float32" or "bfloat16".

    Raises:
        ConfigError: nothing can be loaded from there, weights are missing, or see `encoder_kind`.
    """
    config, extractor = _checked(path)
    # Making a model draws weights, also such that are then read from the file: keep the caller's random state, or
    # what a trial draws next would depend on whether its encoder had been loaded before.
    with torch.random.fork_rng(devices=[]):
        model = _skeleton(path, config) if device == "meta" else _with_weights(path)
        encoder = ENCODERS[config.model_type](model, extractor).eval()
    _cast(encoder, getattr(torch, dtype))
    return encoder.to(device)


def _checked(path: str) -> tuple[Any, Any]:
    """The configurations of an encoder and of its feature extractor.

    Raises:
        ConfigError: see `encoder_kind`.
    """
    with _loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.model_type not in ENCODERS:
        raise ConfigError(
            f"model.encoder.path: {path} is a {config.model_type} model, which is not known to give a clip the same "
            f"frames in every batch; use one of {', '.join(ENCODERS)}"
        )
    with _loading(path):
        extractor = AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False)
    obstacle = ENCODERS[config.model_type].obstacle(config, extractor)
    if obstacle:
        raise ConfigError(f"model.encoder.path: {path} ({config.model_type}) cannot be used: {obstacle}")
    return config, extractor


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Whatever goes wrong is the folder's fault, and transformers, safetensors and the hub have errors of their own."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"model.encoder.path: cannot load an encoder from {path}: {reason(error)}") from None


def _skeleton(path: str, config: Any) -> Any:
    with _loading(path), torch.device("meta"):
        return AutoModel.from_config(config)


def _with_weights(path: str) -> Any:
    """Raises ConfigError where the folder lacks weights: random ones would stand in for them."""
    with _loading(path):
        model, report = AutoModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    missing = {name for name in missing if not name.startswith("decoder.")}  # Whisper's is not used
    if "masked_spec_embed" in missing:  # some checkpoints are saved without; then a hidden frame is zero
        model.masked_spec_embed.data.zero_()
        missing.remove("masked_spec_embed")
    if missing:
        raise ConfigError(
            f"model.encoder.path: {path} lacks {len(missing)} of the encoder's tensors, or has them in another "
            f"shape ({min(missing)}, ...); use a complete checkpoint"
        )
    return model


def _cast(encoder: SpeechEncoder, dtype: torch.dtype) -> None:
    """Cast weights in place, except the frequencies of rotary positions.

    transformers computes positions in their dtype, and bfloat16 tells whole numbers apart only up to 256: frames after
    5 s would share positions.
    """
    kept = {name: buffer for name, buffer in encoder.named_buffers() if name.endswith(".inv_freq")}
    encoder.to(dtype)
    for name, buffer in kept.items():
        encoder.get_submodule(name.rpartition(".")[0]).inv_freq = buffer
