"""The parts of audio LLMs as models by themselves: encoder, projector and language model, each read without the others.

`SpeechLLM` joins them again, so an audio LLM is trained, scored and cached as any other encoder, adapter and LLM are.

Legend: B clips, F frames, D width of the encoder, T embeddings, E width of the LLM, W windows or blocks of clips.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor

from data.errors import ConfigError, UnavailableError, listed
from model.checkpoints.audio_llms import FAMILIES, AudioPart, plain_llm_name
from model.checkpoints.base_files import (
    ADAPTER_CONFIG,
    FilesError,
    adapter_weights,
    download,
    has_bundled_adapter,
    not_plain_lora,
    read_json,
)
from model.config import Layers
from model.encoders.base import SpeechEncoder, hidden_states, set_dropout
from model.encoders.masked_layers import pad_rows
from model.encoders.whisper import WhisperEncoder
from model.runtime.device import on_device
from model.runtime.memory import cached

SETTING = "model.llm.path"


class AudioLLMEncoder(SpeechEncoder):
    """The encoder of an audio LLM, whose projector was trained on what follows the last layer."""

    def set_layers(self, layers: Layers) -> None:
        """Refuse other layers than the last.

        Raises:
            ConfigError: another one is asked for.
        """
        if layers != "last":
            raise ConfigError(
                f"model.encoder.layers: {layers} is not for the encoder of an audio LLM "
                f"({self.model.config.model_type}); set last"
            )


class Qwen2AudioEncoder(AudioLLMEncoder, WhisperEncoder):
    """The encoder of Qwen2-Audio: Whisper's layers over the frames of the clip, averaged in pairs before the last norm.

    The model masks the silence behind a clip, so computing the clip's own frames gives the same numbers in less time.
    """

    pooled = 2

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        super().__init__(model, extractor)
        self.context = "clip"
        self.min_samples = self.samples_per_frame + 1  # two frames
        model.layer_norm = PairedLayerNorm(model.layer_norm)

    def set_context(self, context: Literal["window", "clip"]) -> None:
        SpeechEncoder.set_context(self, context)


class PairedLayerNorm(nn.LayerNorm):
    """A layer norm over the averages of pairs of frames."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(list(norm.normalized_shape), norm.eps)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: Tensor) -> Tensor:
        """Return frames [W, F // 2, D] from hidden_WFD; an odd last frame is left out."""
        return super().forward(F.avg_pool1d(input.transpose(1, 2), 2).transpose(1, 2))


class GraniteSpeechEncoder(AudioLLMEncoder):
    """The encoder of Granite Speech: a conformer over stacked log-mel steps that attends within blocks of frames.

    Its attention and convolutions have no mask for the padding of a batch, so each clip is computed alone. In the
    middle, a CTC head's prediction is added to the frames (self-conditioned CTC, Nozaki and Komatsu, 2021).
    """

    input_name = "input_features"

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor) -> None:
        super().__init__(model, extractor)
        settings = extractor.melspec_kwargs
        self.hop: int = settings["hop_length"]
        # The spectrogram reflects half a window at both ends, and two steps make a frame.
        self.min_samples = max(settings["n_fft"] // 2 + 1, self.hop)

    @property
    def final_norm(self) -> nn.Module:
        return nn.Identity()

    def _count_frames(self, n_samples: int) -> int:
        return (n_samples // self.hop + 1) // 2

    def _encode(self, clips: list[np.ndarray], time_masks: Sequence[np.ndarray] | None) -> tuple[Tensor, Sequence[int]]:
        rows = []
        for number, clip in enumerate(clips):
            features_FD = on_device(self._extract(clip), self.device, self.model.dtype)
            if time_masks is not None:
                features_FD = features_FD.masked_fill(on_device(time_masks[number][:, None], self.device), 0.0)
            rows.append(self.model.input_linear(features_FD))
        lengths = [len(row) for row in rows]
        return self._upper_layers(pad_rows(rows), lengths, 0), lengths

    def _upper_layers(self, hidden_WFD: Tensor, lengths: Sequence[int], start: int) -> Tensor:
        rows = zip(hidden_WFD, lengths, strict=True)
        return pad_rows([self._upper_layers_alone(row_FD[:length], start) for row_FD, length in rows])

    def _clip_frames(self, hidden_WFD: Tensor, lengths: Sequence[int], n_samples: Sequence[int]) -> Tensor:
        return hidden_WFD

    def _upper_layers_alone(self, hidden_FD: Tensor, start: int) -> Tensor:
        """Compute the layers from `start` on over the frames of one clip."""
        model, hidden_BFD = self.model, hidden_FD[None]
        for index, layer in enumerate(self.transformer.layers[start:], start):
            if index and index == model.num_layers // 2:
                hidden_BFD = hidden_BFD + model.out_mid(model.out(hidden_BFD).softmax(-1))
            hidden_BFD = hidden_states(layer(hidden_BFD, attention_dists=model.attention_dists))
        return hidden_BFD[0]

    def _extract(self, clip: np.ndarray) -> np.ndarray:
        with torch.autocast("cpu", enabled=False):
            features: np.ndarray = self.extractor(clip)[self.input_name][0].numpy()
        return features


class Projector(nn.Module):
    """The projector of an audio LLM in the place of an adapter. It draws no dropout.

    Args:
        module: the module of transformers.
        window: frames that make embeddings together; a clip's last ones are padded with zero frames.
        per_window: embeddings of a window.
    """

    def __init__(self, module: nn.Module, window: int = 1, per_window: int = 1) -> None:
        super().__init__()
        self.module, self.window, self.per_window = module, window, per_window
        set_dropout(module, 0.0)

    def num_embeddings(self, n_frames: int) -> int:
        """Return the number of embeddings of a clip of `n_frames` frames."""
        return -(-n_frames // self.window) * self.per_window

    def forward(self, frames_BFD: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Return the embeddings of each clip, [T_i, E], from frames_BFD that are zero beyond its length."""
        embeddings_BTE: Tensor = self.module(frames_BFD)
        counts = map(self.num_embeddings, lengths)
        return [row_TE[:count] for row_TE, count in zip(embeddings_BTE, counts, strict=True)]

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings of each clip, [T_i, E], from cached frames of a frozen encoder, [F_i, D]."""
        return self.forward(pad_rows(features), list(map(len, features)))


def load_projector(path: str, device: str) -> Projector:
    """Return a projector for one trial, in float32. Only its tensors are read.

    Raises:
        ConfigError: see `read_part`.
    """
    return copy.deepcopy(_load_projector(path, device))


@cached
def _load_projector(path: str, device: str) -> Projector:
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
        if config.model_type == "qwen2_audio":
            from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioMultiModalProjector

            projector = Projector(Qwen2AudioMultiModalProjector(config))
        else:
            from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector

            module = GraniteSpeechEncoderProjector(config)
            projector = Projector(module, config.window_size, module.num_queries)
    if device != "meta":
        tensors = read_part(path, config, "projector")
        _refuse_missing(path, "projector", projector.module.state_dict().keys() - tensors.keys())
        projector.module.load_state_dict(tensors)
    return projector.to(device).requires_grad_(False).eval()


def build_encoder_model(path: str, config: PretrainedConfig, device: str) -> PreTrainedModel:
    """Return the encoder of an audio LLM as transformers has it, on the device "cpu", or "meta" without values."""
    from transformers import GraniteSpeechCTCEncoder, Qwen2AudioEncoder

    if config.model_type == "qwen2_audio":
        kind, settings = Qwen2AudioEncoder, config.audio_config
    else:
        kind, settings = GraniteSpeechCTCEncoder, config.encoder_config
    if device == "meta":
        with torch.device("meta"):
            return kind(settings)
    model, missing = _from_tensors(kind, settings, read_part(path, config, "encoder"), torch.float32)
    _refuse_missing(path, "encoder", missing)
    return model


def language_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of an audio LLM's language model."""
    text: PretrainedConfig = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = FAMILIES[config.model_type].ties and config.tie_word_embeddings
    return text


def build_language_model(
    path: str, config: PretrainedConfig, dtype: torch.dtype, options: Mapping[str, object]
) -> tuple[PreTrainedModel, set[str]]:
    """Return the language model of an audio LLM, and the names of missing tensors.

    Args:
        path: Hugging Face id or local folder.
        config: of the audio LLM.
        dtype: of the weights.
        options: of transformers, for weights that are quantized; without any, the model is on the CPU.
    """
    text = language_config(config)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(text))
    return _from_tensors(kind, text, read_part(path, config, "llm"), dtype, options)


def _from_tensors(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    options: Mapping[str, object] | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """Return a model with given tensors, and the names of those that are missing."""
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        **(options or {}),
    )
    return model, {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}


def _refuse_missing(path: str, part: str, missing: set[str]) -> None:
    if missing:
        raise UnavailableError(
            f"{SETTING}: {path} lacks {len(missing)} of the {part}'s tensors, or has them in another shape "
            f"({listed(missing)}); use a complete checkpoint"
        )


def read_part(path: str, config: PretrainedConfig, part: AudioPart) -> dict[str, Tensor]:
    """Return the tensors of a part of an audio LLM by their names within it; tensors of other parts are not read.

    Args:
        path: Hugging Face id or local folder.
        config: of the audio LLM.
        part: which one. A LoRA adapter that is published with the model is added to the weights of the LLM.

    Raises:
        UnavailableError: a file is missing or damaged.
        ConfigError: the adapter that is published with the model is no plain LoRA.
    """
    files, family = download(SETTING, path, "audio-llm"), FAMILIES[config.model_type]
    folder = files.settings[0].parent
    bundled = adapter_weights(folder) if has_bundled_adapter(folder) else None
    tensors: dict[str, Tensor] = {}
    for file in files.weights:
        if file != bundled:
            tensors |= _read_tensors(file, lambda name: family.renamed(name, part))
    if bundled is not None and part == "llm":
        _add_lora(path, folder, bundled, tensors)
    return tensors


def _read_tensors(file: Path, renamed: Callable[[str], str | None]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file that have a new name, under it."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 - it is no mapping
                if (new := renamed(name)) is not None:
                    yield new, content.get_tensor(name)
        return
    for name, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
        if (new := renamed(name)) is not None:
            yield new, tensor


def _add_lora(path: str, folder: Path, file: Path, tensors: dict[str, Tensor]) -> None:
    """Add the LoRA adapter that is published with an audio LLM to the weights of its language model, in float32."""
    try:
        adapter = read_json(folder / ADAPTER_CONFIG)
    except FilesError as error:
        raise UnavailableError(f"{SETTING}: {path}: {error}") from None
    problem = not_plain_lora(adapter) or ("uses DoRA" if adapter.get("use_dora") else "")
    rank = int(str(adapter.get("r")))
    scale = float(str(adapter.get("lora_alpha"))) / (rank**0.5 if adapter.get("use_rslora") else rank)
    updates = dict(_read_tensors(file, lambda name: plain_llm_name(name.removeprefix("base_model.model."))))
    for name in [name for name in updates if name.endswith(".lora_A.weight")]:
        weight, up = name.replace(".lora_A", ""), name.replace(".lora_A", ".lora_B")
        if weight not in tensors or up not in updates:
            problem = problem or f"adapts {weight}, which is no layer of its language model"
            break
        tensors[weight] = tensors[weight].float() + scale * (updates[up].float() @ updates[name].float())
    if problem:
        raise ConfigError(
            f"{SETTING}: {path}: the adapter in its folder {problem}; merge it into the model, or remove it"
        )
