"""Llama-3.2-3B and HuBERT-large with random weights that are drawn on the device: files would take minutes."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, HubertConfig, LlamaConfig

from model.encoders import loading as encoder_module
from model.speech_llm import language_model as llm_module

LLAMA_3B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    tie_word_embeddings=True,
)
HUBERT_LARGE = HubertConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    conv_bias=True,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
)


@contextlib.contextmanager
def random_weights(llm: Path, encoder: Path, device: str = "cuda") -> Iterator[None]:
    """Load the real shapes instead of the models in these two folders, with their tokenizer and feature extractor."""

    def random(kind: Any, config: Any) -> Any:
        read = kind.from_pretrained

        def load(path: str, dtype: torch.dtype, **rest: Any) -> Any:
            with torch.random.fork_rng(), torch.device(device):  # reading files would keep the random state
                torch.manual_seed(1)
                model = kind.from_config(config, dtype=dtype)
            if rest.get("quantization_config") is not None:  # weights are quantized while files are read
                with tempfile.TemporaryDirectory() as folder:
                    model.cpu().save_pretrained(folder)
                    return read(folder, dtype=dtype, **rest)
            return (model, {"missing_keys": [], "mismatched_keys": []}) if rest.get("output_loading_info") else model

        return load

    original = AutoConfig.from_pretrained
    shapes = {str(llm): LLAMA_3B, str(encoder): HUBERT_LARGE}

    def settings(path: str, **rest: Any) -> Any:
        return shapes.get(str(path)) or original(path, **rest)

    with (
        mock.patch.object(llm_module.AutoModelForCausalLM, "from_pretrained", random(AutoModelForCausalLM, LLAMA_3B)),
        mock.patch.object(encoder_module.AutoModel, "from_pretrained", random(AutoModel, HUBERT_LARGE)),
        mock.patch.object(AutoConfig, "from_pretrained", settings),
    ):
        yield
