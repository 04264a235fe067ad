"""Audio LLMs: language models that hear with an encoder and a projector of their own. Imports no torch.

A base model of these families is one checkpoint with three parts, each named by the start of its tensors' names.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import ConfigError
from model.checkpoints.base_files import CONFIG, FilesError, local_folder, read_json
from model.config import ModelConfig

AudioPart = Literal["encoder", "projector", "llm"]


@dataclass(frozen=True)
class AudioFamily:
    """How a family of transformers names its parts.

    Args:
        encoder: module of the encoder within the model.
        projector: module that maps the encoder's frames to embeddings of the LLM.
        placeholder: token that stands for an embedding of a clip in a text; no prompt of ours has it.
        begin: token before a clip; none if the family has none.
        end: token behind a clip.
        ties: whether the LM head is the embedding table where the configuration says so; otherwise it never is.
    """

    encoder: str
    projector: str
    placeholder: str
    begin: str = ""
    end: str = ""
    ties: bool = False

    def renamed(self, name: str, part: AudioPart) -> str | None:
        """Return the name that a tensor of a checkpoint has within a part; None if it belongs to another part.

        Checkpoints of transformers before version 5 have no "model." before a part, and "language_model." before the
        LM head.
        """
        name = name.removeprefix("model.")
        if part != "llm":
            prefix = f"{getattr(self, part)}."
            return name.removeprefix(prefix) if name.startswith(prefix) else None
        return plain_llm_name(name) if name.startswith(("language_model.", "lm_head.")) else None


FAMILIES = {  # by the model type in config.json
    "qwen2_audio": AudioFamily("audio_tower", "multi_modal_projector", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    "granite_speech": AudioFamily("encoder", "projector", "<|audio|>", ties=True),
}
# Other families of audio LLMs in transformers, which are refused by name.
UNSUPPORTED = {
    "audioflamingo3",
    "fun_asr_nano",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "glmasr",
    "granite_speech_plus",
    "higgs_audio_v2",
    "kyutai_speech_to_text",
    "moss_transcribe_diarize",
    "musicflamingo",
    "nemo_speechlm",
    "nemotron_h_omni",
    "phi4_multimodal",
    "qwen2_5_omni",
    "qwen2_5_omni_thinker",
    "qwen3_asr",
    "qwen3_omni_moe",
    "qwen3_omni_moe_thinker",
    "ultravox",
    "vibevoice",
    "vibevoice_asr",
    "voxtral",
    "voxtral_realtime",
}


def plain_llm_name(name: str) -> str:
    """Return the name that a tensor of an audio LLM's language model has in the language model alone."""
    for inside in ("language_model.model.", "model.language_model.", "language_model."):
        if inside + "lm_head." in name:
            return name.replace(inside, "", 1)
        if inside in name:
            return name.replace(inside, "model.", 1)
    return name


def audio_llm_name(name: str) -> str:
    """Return the name that a tensor of a language model has in its audio LLM; `plain_llm_name` is the inverse."""
    return name if "lm_head." in name else name.replace("model.layers.", "model.language_model.layers.", 1)


def audio_family(path: str) -> AudioFamily | None:
    """Return the family of an audio LLM; None for other language models, and for an id that is not downloaded."""
    return FAMILIES.get(_model_type(path))


def refuse_unsupported(path: str) -> None:
    """Refuse a model that is an audio LLM of a family that is not supported.

    Raises:
        ConfigError: names the family.
    """
    if (kind := _model_type(path)) in UNSUPPORTED:
        raise ConfigError(
            f"model.llm.path: {path} is an audio LLM of the family {kind}, which is not supported; use one of "
            f"{', '.join(FAMILIES)}, or an LLM with an encoder in model.encoder.path"
        )


def check_audio_llm(config: ModelConfig) -> None:
    """Check that the model that is to hear does, and only it. An id that is not downloaded is checked later.

    Raises:
        ConfigError: `model.encoder.path` is null and the LLM has no encoder, or it names one and the LLM has its own.
    """
    path, encoder = config.llm.path, config.encoder.path
    if not config.uses_audio or not (kind := _model_type(path)):
        return
    supported = ", ".join(FAMILIES)
    if encoder is None:
        refuse_unsupported(path)
    if kind in FAMILIES and encoder is not None:
        raise ConfigError(
            f"model.encoder.path: {encoder}, but model.llm.path ({path}) is an audio LLM ({kind}), which hears with "
            "its own encoder; set model.encoder.path=null"
        )
    if kind not in FAMILIES and encoder is None:
        raise ConfigError(
            f"model.encoder.path: null is for an audio LLM ({supported}), and model.llm.path ({path}) is a {kind} "
            "model without an encoder; name an encoder"
        )


def _model_type(path: str) -> str:
    """Return the model type in a model's config.json; an empty string if it is not there."""
    try:
        folder = local_folder(path)
        if folder is None:
            return ""
        file = folder / CONFIG
        return _read_model_type(str(file), file.stat().st_mtime_ns)
    except (FilesError, OSError):
        return ""  # the check of the files reports it


@functools.lru_cache(maxsize=64)
def _read_model_type(file: str, stamp: int) -> str:
    return str(read_json(Path(file)).get("model_type", ""))
