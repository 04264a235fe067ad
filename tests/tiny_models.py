"""Untrained tiny models of every kind, saved as Hugging Face folders, which load like published ones.

They have the layouts of published checkpoints: "layer" of the large ones (normalisation in every convolution), "group"
of the base ones (over time, in the first convolution).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    GraniteSpeechConfig,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperFeatureExtractor,
    WhisperModel,
)

from model.tiny import WINDOW_SECONDS, fixed_seed, tiny_llama, tiny_tokenizer, tiny_whisper_config

Norm = Literal["layer", "group"]

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def random_wave(
    folder: Path, model: type[PreTrainedModel], config: type[Any], norm: Norm, seed: int, **changed: Any
) -> None:
    """Save an untrained encoder of the wav2vec 2.0 family, with either normalisation."""
    layer = norm == "layer"
    settings = {
        **SMALL,
        "conv_dim": (16,) * 7,
        "conv_bias": layer,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": layer,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    _save(folder, lambda: model(config(**settings | changed)), seed)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=layer).save_pretrained(folder)


random_hubert = partial(random_wave, model=HubertModel, config=HubertConfig, seed=3)
random_wav2vec2 = partial(random_wave, model=Wav2Vec2Model, config=Wav2Vec2Config, seed=6)
random_wavlm = partial(random_wave, model=WavLMModel, config=WavLMConfig, seed=7)


def random_conformer(folder: Path, positions: str | None, norm: Norm = "layer") -> None:
    """Save an untrained wav2vec2-conformer with relative, rotary or no position embeddings."""
    changed = {"position_embeddings_type": positions, "conv_depthwise_kernel_size": 15}
    random_wave(folder, Wav2Vec2ConformerModel, Wav2Vec2ConformerConfig, norm, seed=8, **changed)


def random_w2v_bert(folder: Path, positions: str | None = "relative_key") -> None:
    """Save an untrained w2v-BERT over 20 mel bands."""
    config = Wav2Vec2BertConfig(
        **SMALL, feature_projection_input_dim=40, conv_depthwise_kernel_size=15, position_embeddings_type=positions
    )
    _save(folder, lambda: Wav2Vec2BertModel(config), seed=9)
    SeamlessM4TFeatureExtractor(feature_size=20, num_mel_bins=20).save_pretrained(folder)


def random_whisper(folder: Path) -> None:
    """Save an untrained Whisper with the window of `make_encoder`."""
    _save(folder, lambda: WhisperModel(tiny_whisper_config(width=32, layers=2, mels=40)), seed=4)
    WhisperFeatureExtractor(feature_size=40, chunk_length=WINDOW_SECONDS).save_pretrained(folder)


def random_llm(folder: Path) -> None:
    """Save an untrained Llama with the tokenizer of `make_llm`."""
    tokenizer = tiny_tokenizer()
    _save(folder, lambda: tiny_llama(tokenizer, width=32, layers=2), seed=5)
    tokenizer.save_pretrained(folder)


QWEN2: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1}
AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|audio|>")


def audio_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `make_llm` with the tokens that mark clips."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(AUDIO_TOKENS)})
    return tokenizer


def random_qwen2_audio(folder: Path) -> None:
    """Save an untrained Qwen2-Audio with a window of 1 s: a Whisper-like encoder, a linear projector and a Qwen2."""
    tokenizer = audio_tokenizer()
    encoder = tiny_whisper_config(width=32, layers=2, mels=40).to_dict()
    audio = {name: value for name, value in encoder.items() if name in vars(Qwen2AudioEncoderConfig())}
    config = Qwen2AudioConfig(
        audio_config={**audio, "model_type": "qwen2_audio_encoder"},
        text_config={**QWEN2, "model_type": "qwen2", "vocab_size": len(tokenizer), **special_ids(tokenizer)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    _save(folder, lambda: Qwen2AudioForConditionalGeneration(config), seed=10)
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=WINDOW_SECONDS, return_attention_mask=True)
    Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(folder)


def random_granite_speech(folder: Path) -> None:
    """Save an untrained Granite Speech: a conformer with blocks of 20 frames, a Q-Former and a tied Granite.

    The token that stands for a clip has no embedding, as in the published models.
    """
    tokenizer = audio_tokenizer()
    placeholder = tokenizer.convert_tokens_to_ids("<|audio|>")
    assert placeholder == len(tokenizer) - 1
    encoder = {"input_dim": 160, "num_layers": 2, "hidden_dim": 32, "num_heads": 4, "output_dim": 12}
    encoder |= {
        "context_size": 20,
        "max_pos_emb": 24,
        "conv_kernel_size": 5,
        "conv_expansion_factor": 2,
        "dropout": 0.0,
    }
    config = GraniteSpeechConfig(
        encoder_config=encoder,
        projector_config={**SMALL, "model_type": "blip_2_qformer", "num_hidden_layers": 1, "encoder_hidden_size": 32},
        text_config={**QWEN2, "model_type": "granite", "vocab_size": placeholder, **special_ids(tokenizer)},
        audio_token_index=placeholder,
        has_lora_adapter=False,
        tie_word_embeddings=True,
    )
    _save(folder, lambda: GraniteSpeechForConditionalGeneration(config), seed=11)
    GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(), tokenizer).save_pretrained(folder)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


AUDIO_LLMS: dict[str, Callable[[Path], None]] = {
    "qwen2-audio": random_qwen2_audio,
    "granite-speech": random_granite_speech,
}
ENCODERS: dict[str, Callable[[Path], None]] = {
    "hubert-layer": partial(random_hubert, norm="layer"),
    "hubert-group": partial(random_hubert, norm="group"),
    "wav2vec2-layer": partial(random_wav2vec2, norm="layer"),
    "wav2vec2-group": partial(random_wav2vec2, norm="group"),
    "wavlm-layer": partial(random_wavlm, norm="layer"),
    "wavlm-group": partial(random_wavlm, norm="group"),
    "conformer-relative": partial(random_conformer, positions="relative"),
    "conformer-rotary": partial(random_conformer, positions="rotary"),
    "w2v-bert": random_w2v_bert,
    "whisper": random_whisper,
}
MODELS: dict[str, Callable[[Path], None]] = {**ENCODERS, **AUDIO_LLMS, "llm": random_llm}


def _save(folder: Path, make: Callable[[], Any], seed: int) -> None:
    with fixed_seed(seed):
        model = make()
        _perturb_norms(model)
    model.eval().save_pretrained(folder)


@torch.no_grad()
def _perturb_norms(model: nn.Module) -> None:
    """Perturb norms: fresh ones scale by 1 and shift by 0, which maps padding to padding and would hide a leak."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d):
            module.weight.add_(0.3 * torch.randn_like(module.weight))
            module.bias.add_(0.3 * torch.randn_like(module.bias))
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.add_(0.3 * torch.randn_like(module.running_mean))
            module.running_var.mul_(torch.exp(0.3 * torch.randn_like(module.running_var)))
