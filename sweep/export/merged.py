"""A merged model: the LLM with LoRA added to its weights, encoder and adapter, as plain transformers loads them.

config.json, model.safetensors, tokenizer   the LLM, for `AutoModelForCausalLM` and `AutoTokenizer`; an audio LLM whole,
                                            for `AutoModelForMultimodalLM` and `AutoProcessor`
encoder/                                    another encoder, for `AutoModel` and `AutoFeatureExtractor`
speech.safetensors                          the adapter and the learned vectors; absent without either
queries.py                                  the layers of an adapter of learned queries
"""

import inspect
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, GenerationConfig, PreTrainedModel

from model.checkpoints.audio_llms import FAMILIES
from model.checkpoints.peft_export import SPEECH
from model.encoders.audio_llms import Projector
from model.encoders.base import SpeechEncoder
from model.encoders.loading import load_encoder
from model.encoders.lora import merged_tensors
from model.encoders.whisper import WhisperEncoder
from model.parts import part_of
from model.speech_llm import queries
from model.speech_llm.adapter import Adapter
from model.speech_llm.language_model import merge_lora
from model.speech_llm.speech_llm import SpeechLLM

ENCODER = "encoder"
# Whisper's decoder is never computed, and AutoModel would draw a missing one at random: it is saved without layers.
NO_DECODER = {
    "decoder_layers": 0,
    "vocab_size": 4,
    "max_target_positions": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
    "forced_decoder_ids": None,
}


def write_merged(model: SpeechLLM, folder: Path) -> None:
    """Write all weights of a model. Its LoRA layers are merged, so it must not be used afterwards.

    Args:
        model: a trained model on the CPU or a GPU; the base models that it shares stay as they are.
        folder: exists.
    """
    llm, own = merge_lora(model.llm), isinstance(model.adapter, Projector)
    if own:
        _write_audio_llm(model, llm, folder)
    else:
        llm.save_pretrained(folder)
        model.prompt_builder.tokenizer.hf.save_pretrained(folder)
    if model.encoder is not None and not own:
        _write_encoder(model, model.encoder, folder / ENCODER)
    if isinstance(model.adapter, Adapter) and model.adapter.queries is not None:  # transformers has no such layers
        (folder / "queries.py").write_text(inspect.getsource(queries), encoding="utf-8")
    names = ("tokens",) if own else ("adapter", "tokens")
    speech = {name: tensor.detach() for name, tensor in model.named_parameters() if part_of(name) in names}
    if speech:
        _save(speech, folder / SPEECH)


def _write_audio_llm(model: SpeechLLM, llm: PreTrainedModel, folder: Path) -> None:
    """Write an audio LLM with the class of its family, whose parts the model has."""
    path = model.config.llm.path
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    family = FAMILIES[config.model_type]
    assert model.encoder is not None
    assert isinstance(model.adapter, Projector)
    parts = {
        "language_model": llm.base_model.state_dict(),
        family.encoder: merged_tensors(model.encoder),
        family.projector: model.adapter.module.state_dict(),
    }
    tensors = {f"model.{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    tensors["lm_head.weight"] = llm.get_output_embeddings().weight
    if hasattr(config, "has_lora_adapter"):
        config.has_lora_adapter = False  # the one that was published with the model is merged, too
    if family.ties:
        config.tie_word_embeddings = llm.config.tie_word_embeddings
    with torch.device("meta"):
        kind = type(AutoModelForMultimodalLM.from_config(config))
    whole = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=llm.dtype, trust_remote_code=False)
    whole.generation_config = GenerationConfig()  # as in training: replies are greedy
    whole.save_pretrained(folder)
    AutoProcessor.from_pretrained(path, trust_remote_code=False).save_pretrained(folder)


def _write_encoder(model: SpeechLLM, encoder: SpeechEncoder, folder: Path) -> None:
    """Write an encoder with the settings of its published folder, some of which loading has changed.

    Layers above those that are heard are as they were published.
    """
    path = model.config.encoder_path
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config.dtype = encoder.model.dtype
    published = load_encoder(path, model.base_device, model.config.encoder.dtype).model.state_dict()
    tensors = published | merged_tensors(encoder)
    if isinstance(encoder, WhisperEncoder):
        config.update(NO_DECODER)
        width = encoder.state_width
        decoder: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (4, width), "embed_positions.weight": (1, width)}
        decoder |= {f"layer_norm.{name}": (width,) for name in ("weight", "bias")}
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"decoder.{name}": torch.zeros(shape) for name, shape in decoder.items()}
    config.save_pretrained(folder)
    encoder.extractor.save_pretrained(folder)
    _save(tensors, folder / "model.safetensors")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors, each in its own memory, with the metadata that transformers asks for."""
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
