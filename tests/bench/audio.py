"""What an audio LLM costs beside the same language model with an encoder and an adapter: step time and peak memory.

    python -m tests.bench audio --record

Every model has a language model of 20 million parameters (Qwen2 or Granite) and an encoder of Whisper base's size; 16
clips a step. The default reads the pooled output of the frozen encoder from the cache, 12.5 embeddings a second.
Qwen2-Audio has 25 a second, and Granite Speech 10, behind a Q-Former that trains. Every variant has a process of its
own for its memory; the steps are timed in turns.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteSpeechConfig,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
    PretrainedConfig,
    ProcessorMixin,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from model.encoders.audio_llms import language_config
from model.tiny import fixed_seed
from sweep.config.schema import Config
from tests.bench.materials import made, settings
from tests.bench.measure import Row
from tests.bench.options import cache, compare
from tests.tiny_models import audio_tokenizer, special_ids

DEFAULT = "default: Whisper base and Qwen2, from the cache"
LLM = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 14,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
TRAINS = {"model.trainable": "encoder+adapter+lora"}


def run() -> list[Row]:
    """Return how many times the default's CPU time each variant takes, with its peak memory."""
    torch.set_num_threads(1)
    configs = variants()
    cache(configs)
    return compare(configs)


def variants(**changed: Any) -> dict[str, Config]:
    """Return the configurations by name, the default first."""
    qwen, granite = made("qwen2-audio-20m", qwen2_audio), made("granite-speech-20m", granite_speech)
    whisper = {"model.encoder.path": str(made("whisper-base", whisper_base)), "model.encoder.context": "clip"}
    whisper["model.llm.path"] = str(made("qwen2-20m", qwen2))
    own = {
        name: {"model.encoder.path": None, "model.llm.path": str(path)} for name, path in (("q", qwen), ("g", granite))
    }
    named: dict[str, dict[str, Any]] = {
        DEFAULT: whisper,
        "Qwen2-Audio, from the cache": own["q"],
        "Granite Speech, from the cache": own["g"],
        "Whisper base trains": whisper | TRAINS,
        "Qwen2-Audio, encoder trains": own["q"] | TRAINS,
        "Granite Speech, encoder trains": own["g"] | TRAINS,
    }
    return {name: settings(**{"data.history": 3} | changed | own) for name, own in named.items()}


def qwen2_audio(folder: Path) -> None:
    """Save an untrained Qwen2-Audio."""
    tokenizer = audio_tokenizer()
    config = Qwen2AudioConfig(
        audio_config={**BASE, "model_type": "qwen2_audio_encoder", "num_mel_bins": 80},
        text_config={**LLM, "model_type": "qwen2", "vocab_size": len(tokenizer) + 8, **special_ids(tokenizer)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(return_attention_mask=True), tokenizer)
    _save(folder, Qwen2AudioForConditionalGeneration, config, processor)


def granite_speech(folder: Path) -> None:
    """Save an untrained Granite Speech; a Q-Former of two layers, as the published ones have."""
    tokenizer = audio_tokenizer()
    former = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 2048}
    config = GraniteSpeechConfig(
        encoder_config={"num_layers": 6, "hidden_dim": 512, "num_heads": 8, "dropout": 0.0},
        projector_config={**former, "model_type": "blip_2_qformer", "encoder_hidden_size": 512},
        text_config={**LLM, "model_type": "granite", "vocab_size": len(tokenizer), **special_ids(tokenizer)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
    )
    processor = GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(), tokenizer)
    _save(folder, GraniteSpeechForConditionalGeneration, config, processor)


def qwen2(folder: Path) -> None:
    """Save the language model of the Qwen2-Audio."""
    config = Qwen2AudioConfig.from_pretrained(made("qwen2-audio-20m", qwen2_audio))
    with fixed_seed(seed=0):
        AutoModelForCausalLM.from_config(language_config(config)).eval().save_pretrained(folder)
    audio_tokenizer().save_pretrained(folder)


def whisper_base(folder: Path) -> None:
    """Save an untrained Whisper whose decoder is as small as possible."""
    with fixed_seed(seed=0):
        small = {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 1}
        WhisperModel(WhisperConfig(**BASE, **small)).eval().save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def _save(folder: Path, kind: Any, config: PretrainedConfig, processor: ProcessorMixin) -> None:
    with fixed_seed(seed=0):
        kind(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
