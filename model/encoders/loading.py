"""Load a speech encoder from a Hugging Face id or folder.

An encoder that cannot be made independent of its batch is refused before any weight is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    SequenceFeatureExtractor,
)

from data.errors import ConfigError, UnavailableError, reason
from model.encoders.audio_llms import GraniteSpeechEncoder, Qwen2AudioEncoder, build_encoder_model
from model.encoders.base import SpeechEncoder
from model.encoders.conformer import Wav2Vec2BertEncoder, Wav2Vec2ConformerEncoder
from model.encoders.wav2vec2 import WaveformEncoder, WavLMEncoder
from model.encoders.whisper import WhisperEncoder
from model.runtime.memory import cached

AUDIO_LLMS: dict[str, type[SpeechEncoder]] = {  # of which the encoder is loaded, by the model type in config.json
    "qwen2_audio": Qwen2AudioEncoder,
    "granite_speech": GraniteSpeechEncoder,
}
ENCODERS: dict[str, type[SpeechEncoder]] = {  # by the model type in config.json
    "hubert": WaveformEncoder,
    "wav2vec2": WaveformEncoder,
    "wavlm": WavLMEncoder,
    "wav2vec2-conformer": Wav2Vec2ConformerEncoder,
    "wav2vec2-bert": Wav2Vec2BertEncoder,
    "whisper": WhisperEncoder,
}


def encoder_kind(path: str) -> str:
    """Return the model type of an encoder from its configuration alone.

    Raises:
        ConfigError: there is no configuration, or a clip's frames would depend on the batch.
    """
    kind: str = _checked_config(path)[1].model_type
    return kind


@cached
def load_encoder(path: str, device: str, dtype: str = "float32") -> SpeechEncoder:
    """Load an encoder in evaluation mode. The trials of a process share its weights, see `cached`.

    Args:
        path: Hugging Face id or local folder, of an audio LLM for its encoder.
        device: "cpu", "cuda", or "meta" for a model without values, made from the configuration alone.
        dtype: of the weights and frames, "float32" or "bfloat16".

    Raises:
        ConfigError: the encoder cannot be loaded, weights are missing, or `encoder_kind` refuses it.
    """
    kind, config, extractor = _checked_config(path)
    # Making a model draws random weights, even if a file then replaces them. Without the fork, what a trial draws next
    # would depend on whether the process had loaded its encoder before.
    with torch.random.fork_rng(devices=[]):
        if config.model_type in AUDIO_LLMS:
            model = build_encoder_model(path, config, device)
        elif device == "meta":
            with _as_config_error(path), torch.device("meta"):
                model = AutoModel.from_config(config)
        else:
            model = _load_weights(path)
        encoder = kind(model, extractor).eval()
    _cast(encoder, getattr(torch, dtype))
    return encoder.to(device)


def _checked_config(path: str) -> tuple[type[SpeechEncoder], PretrainedConfig, SequenceFeatureExtractor]:
    """Return the class, the configuration and the extractor of an encoder, or raise as `encoder_kind` does."""
    with _as_config_error(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.model_type in AUDIO_LLMS:
        kind = AUDIO_LLMS[config.model_type]
    elif config.model_type not in ENCODERS:
        raise ConfigError(
            f"model.encoder.path: {path} is a {config.model_type} model, for which it is unknown whether a clip has "
            f"the same frames in every batch; use one of {', '.join(ENCODERS)}"
        )
    else:
        kind = ENCODERS[config.model_type]
    with _as_config_error(path):
        extractor = AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False)
    problem = kind.unsupported_reason(config, extractor)
    if problem:
        setting = "model.llm.path" if config.model_type in AUDIO_LLMS else "model.encoder.path"
        raise ConfigError(f"{setting}: {path} ({config.model_type}) cannot be used: {problem}")
    return kind, config, extractor


@contextmanager
def _as_config_error(path: str) -> Iterator[None]:
    """Raise ConfigError for every error of a block; transformers, safetensors and the hub raise many types."""
    try:
        yield
    except Exception as error:
        raise UnavailableError(f"model.encoder.path: cannot load an encoder from {path}: {reason(error)}") from None


def _load_weights(path: str) -> PreTrainedModel:
    """Load a model, or raise ConfigError where transformers would replace missing weights by random ones."""
    with _as_config_error(path):
        model, report = AutoModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    missing = {name for name in missing if not name.startswith("decoder.")}  # Whisper's decoder is not used
    if "masked_spec_embed" in missing:  # some checkpoints lack it; a hidden frame is zero then
        model.masked_spec_embed.data.zero_()
        missing.remove("masked_spec_embed")
    if missing:
        raise UnavailableError(
            f"model.encoder.path: {path} lacks {len(missing)} of the encoder's tensors, or has them in another "
            f"shape ({min(missing)}, ...); use a complete checkpoint"
        )
    return model


def _cast(encoder: SpeechEncoder, dtype: torch.dtype) -> None:
    """Cast weights in place, except the frequencies of rotary positions.

    transformers computes positions in the dtype of the frequencies, and bfloat16 distinguishes whole numbers only up
    to 256: frames after 5 s would share positions.
    """
    frequencies = {name: buffer for name, buffer in encoder.named_buffers() if name.endswith(".inv_freq")}
    encoder.to(dtype)
    for name, buffer in frequencies.items():
        encoder.get_submodule(name.rpartition(".")[0]).inv_freq = buffer
