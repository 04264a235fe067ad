"""Parts: exactly what the configuration names trains."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from data.errors import ConfigError
from model.checkpoints.checkpoint import trained_tensors
from model.parts import part_of, summarise_parts
from model.speech_llm.language_model import embedding_scale, load_llm
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, build, settings
from tests.model.parts import LORA, NEW, selected
from tests.tiny_models import ENCODERS

LLM_WIDTH, ENCODER_WIDTH = 32, 32


def make(models: Path, kind: str = "hubert-layer", device: str = "meta", **changed: Any) -> SpeechLLM:
    return SpeechLLM(settings(models, kind, **{"lora": LORA} | changed), ANSWERS, device)


def all_names(model: nn.Module, start: str = "") -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(start)}


PARTS_OF = {
    "encoder.model.encoder.layers.1.attention.k_proj.weight": "encoder",
    "adapter.linear.weight": "adapter",
    "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": "lora",
    "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight": "lora",
    "llm.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": "llm",
    "llm.model.embed_tokens.weight": "llm",
    "end_of_audio": "tokens",
    "cls": "tokens",
}


def refusal(models: Path, **changed: Any) -> str:
    """Return the message, one line, with which a model is refused."""
    with pytest.raises(ConfigError) as error:
        make(models, **changed)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_parts_select_their_parameters(models: Path) -> None:
    assert {name: part_of(name) for name in PARTS_OF} == PARTS_OF
    model = make(models, trainable="encoder+adapter+lora+tokens")
    encoder = all_names(model, "encoder.") - all_names(model, "encoder.model.feature_extractor.")
    lora = {name for name in all_names(model) if "lora_" in name}
    assert selected(model) == encoder | all_names(model, "adapter.") | lora | {"end_of_audio", "cls"}
    assert len(lora) == 2 * 2 * 2  # A and B of q_proj and v_proj in two layers
    assert selected(make(models, trainable=NEW)) == selected(model) - encoder
    assert make(models, trainable=["adapter", "lora", "tokens"]).config.trainable == NEW
    everything = make(models, trainable=f"{NEW}+llm")
    assert selected(everything) == all_names(everything) - all_names(everything, "encoder.")
    plain = make(models, trainable="adapter+tokens+llm", lora={"enabled": False})
    assert selected(plain) >= all_names(plain, "llm.")


@pytest.mark.parametrize(
    ("pattern", "start"),
    [
        ("encoder.*.layers.1.*", "encoder.model.encoder.layers.1."),
        ("encoder.model.encoder.layers.0.attention.*", "encoder.model.encoder.layers.0.attention."),
        ("llm.*.layers.1.mlp.*", "llm.base_model.model.model.layers.1.mlp."),
        ("llm.*.mlp.up_proj.weight", "llm.base_model.model.model.layers.?.mlp.up_proj.weight"),
        ("llm.*embed_tokens*", "llm.base_model.model.model.embed_tokens."),
    ],
)
def test_patterns_add_exactly_what_they_match(pattern: str, start: str, models: Path) -> None:
    model = make(models, trainable=f"{NEW}+{pattern}")
    expected = {name for layer in "01" for name in all_names(model, start.replace("?", layer))}
    assert selected(model) - selected(make(models, trainable=NEW)) == expected
    assert expected


def test_missing_parts_select_nothing(models: Path) -> None:
    text = make(models, trainable="encoder+adapter+lora+tokens", modality="text", end_of_audio="none")
    assert {part_of(name) for name in selected(text)} == {"lora", "tokens"}
    assert selected(text) - {name for name in selected(text) if "lora_" in name} == {"cls"}
    speech = make(models, trainable=NEW, modality="speech", lora={"enabled": False}, cls="none", end_of_audio="none")
    assert selected(speech) == {"adapter.linear.weight", "adapter.linear.bias"}


@pytest.mark.parametrize("kind", ENCODERS)
def test_convolutions_of_an_encoder_never_train(kind: str, models: Path) -> None:
    trained = [name for name in selected(make(models, kind, trainable=f"{NEW}+encoder.*")) if "encoder." in name]
    assert trained
    assert not [name for name in trained if "feature_extractor" in name or ".conv1." in name or ".conv2." in name]


@pytest.mark.parametrize("pattern", ["encodr", "encoder.layers.9.*", "llm.*.layers.7.*", "*.feature_extractor.*"])
def test_unknown_pattern_is_refused(pattern: str, models: Path) -> None:
    expected = f"model.trainable: {pattern!r} matches no parameter that can train; use encoder, encoder_lora,"
    assert refusal(models, trainable=f"{NEW}+{pattern}").startswith(expected)


def test_nothing_to_train_is_refused(models: Path) -> None:
    bare = {"modality": "text", "cls": "none", "end_of_audio": "none", "lora": {"enabled": False}}
    message = refusal(models, **bare, trainable="encoder+adapter")
    assert message.startswith("model.trainable: encoder+adapter leaves nothing to train")


@pytest.mark.parametrize(
    ("changed", "part", "name"),
    [
        ({"trainable": "lora+tokens"}, "adapter", "adapter.linear.weight"),
        ({"trainable": "encoder+lora+tokens", "adapter": {"kind": "conv"}}, "adapter", "adapter.conv.weight"),
        ({"trainable": "adapter+lora"}, "tokens", "end_of_audio"),
        ({"trainable": "adapter+lora+end_of_audio"}, "tokens", "cls"),
        ({"trainable": "lora", "modality": "text", "end_of_audio": "none"}, "tokens", "cls"),
        ({"trainable": "adapter+tokens"}, "lora", "lora_A.default.weight"),
        ({"trainable": "adapter+tokens+*lora_A*"}, "lora", "lora_B.default.weight"),
        ({"trainable": "llm", "modality": "text", "cls": "none", "lora": LORA}, "lora", "lora_A.default.weight"),
    ],
)
def test_parts_that_would_stay_random_are_refused(changed: dict[str, Any], part: str, name: str, models: Path) -> None:
    message = refusal(models, **changed)
    assert message.startswith(f"model.trainable: {part} is frozen and was never loaded, so ")
    assert f"{name} would stay random; add {part} to model.trainable, load it with" in message
    assert ("model.adapter.init_from or" in message) == (part == "adapter")


def test_bfloat16_weights_of_the_llm_cannot_train(models: Path) -> None:
    half = {"path": str(models / "llm"), "dtype": "bfloat16"}
    message = refusal(models, trainable=f"{NEW}+llm.*.layers.1.*", llm=half)
    assert message.startswith("model.llm.dtype: bfloat16 is for weights that stay frozen")
    model = make(models, trainable=NEW, llm=half, device="cpu")
    assert {tensor.dtype for tensor in trained_tensors(model).values()} == {torch.float32}
    assert model.llm.get_input_embeddings().weight.dtype == torch.bfloat16


TABLES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"lora": LORA | {"dora": True}},
    "rslora": {"lora": LORA | {"rslora": True}},
    "ratio": {"lora": LORA | {"alpha_ratio": 2.0, "targets": "all-linear"}},
    "mlp": {"adapter": {"kind": "stack", "window": 5, "stride": 5, "hidden": 16}},
    "conv": {"adapter": {"kind": "conv", "window": 4, "stride": 2}},
    "text": {"modality": "text", "end_of_audio": "none"},
    "llm": {"trainable": f"{NEW}+llm"},
    "whisper": {"encoder": {"path": "whisper"}},
}


@pytest.mark.parametrize("name", TABLES)
def test_summary_counts_every_parameter_once(name: str, models: Path) -> None:
    """The summary needs no weights."""
    changed = dict(TABLES[name])
    if "encoder" in changed:
        changed["encoder"] = {"path": str(models / "whisper")}
    model = make(models, device="cpu", **changed)
    rows = summarise_parts(model, model.sources)
    loaded = {"encoder": str(model.config.encoder.path), "llm": str(models / "llm")}
    assert all(row.loaded == loaded.get(row.name, "") for row in rows)
    bare = make(models, device="meta", **changed)
    assert rows == summarise_parts(bare, bare.sources)
    assert sum(row.parameters for row in rows) == len_once(model.parameters())
    assert sum(row.trained for row in rows) == len_once(p for p in model.parameters() if p.requires_grad)
    counts = {row.name: (row.parameters, row.trained) for row in rows}
    assert counts["llm"][0] == len_once(load_llm(str(models / "llm"), "float32", "cpu").parameters())
    rank, layers = 4, 2
    q_and_v = layers * 2 * rank * (LLM_WIDTH + LLM_WIDTH)
    expected = {
        "lora": {"lora": q_and_v, "tokens": 2 * LLM_WIDTH, "adapter": (ENCODER_WIDTH + 1) * LLM_WIDTH},
        "dora": {"lora": q_and_v + layers * 2 * LLM_WIDTH},
        "rslora": {"lora": q_and_v},
        "ratio": {"lora": layers * rank * (4 * 2 * LLM_WIDTH + 3 * (LLM_WIDTH + 256))},
        "mlp": {"adapter": (5 * ENCODER_WIDTH + 1) * 16 + (16 + 1) * LLM_WIDTH},
        "conv": {"adapter": (4 * ENCODER_WIDTH + 1) * ENCODER_WIDTH + (ENCODER_WIDTH + 1) * LLM_WIDTH},
        "text": {"tokens": LLM_WIDTH},
        "llm": {"llm": counts["llm"][1]},
        "whisper": {},
    }[name]
    assert {part: counts[part][0] for part in expected} == expected
    assert all(counts[part][0] == counts[part][1] for part in expected)


def len_once(parameters: Iterator[nn.Parameter]) -> int:
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in parameters}.values())


@pytest.mark.parametrize(
    ("changed", "scale"),
    [
        ({"rank": 4, "alpha": 32}, 8),
        ({"rank": 16, "alpha": 32}, 2),
        ({"rank": 4, "alpha": 32, "rslora": True}, 16),
        ({"rank": 16, "alpha": 32, "rslora": True}, 8),
        ({"rank": 4, "alpha_ratio": 2.5}, 2.5),
        ({"rank": 16, "alpha_ratio": 2.5}, 2.5),
        ({"rank": 3, "alpha": 32, "alpha_ratio": 0.1}, 0.1),
    ],
)
def test_lora_scale(changed: dict[str, Any], scale: float, models: Path) -> None:
    """Measured at the output of a layer, so no name in PEFT has to be trusted."""
    model = build(models, modality="text", end_of_audio="none", lora={"dropout": 0.0} | changed)
    layer = model.llm.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    x_TE = torch.randn(3, LLM_WIDTH)
    with torch.no_grad():
        update = layer(x_TE) - layer.base_layer(x_TE)
        expected = x_TE @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    assert torch.allclose(update, scale * expected, atol=1e-5)
    assert update.abs().max() > 1e-3


def test_unknown_lora_targets_are_refused(models: Path) -> None:
    message = refusal(models, lora={"targets": ["q_proj", "c_attn"]})
    assert message.startswith("model.lora.targets: c_attn match no linear layer; the LLM has ")


def test_llm_with_missing_weights_is_refused(models: Path, tmp_path: Path) -> None:
    """transformers would replace them by random ones."""
    folder = Path(shutil.copytree(models / "llm", tmp_path / "llm"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    removed = tensors.pop(name)

    def message() -> str:
        with pytest.raises(ConfigError) as error:
            load_llm.__wrapped__(str(folder), "float32", "cpu")
        assert "\n" not in str(error.value)
        return str(error.value)

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert (
        message() == f"model.llm.path: {folder} lacks 1 of the LLM's tensors ({name}, ...); use a complete checkpoint"
    )
    save_file(tensors | {name: removed[:3]}, folder / "model.safetensors", metadata={"format": "pt"})
    assert message().startswith(f"model.llm.path: cannot load a causal LM from {folder}: ")
    (folder / "model.safetensors").write_bytes(b"half a file")
    assert message().startswith(f"model.llm.path: cannot load a causal LM from {folder}: ")


def llm_folder(models: Path, folder: Path, kind: type[PreTrainedModel], config: type, **changed: Any) -> dict[str, str]:
    """Save an LLM of another kind with the usual tokenizer, and return its settings."""
    shutil.copytree(models / "llm", folder)
    size = json.loads((models / "llm" / "config.json").read_text())["vocab_size"]
    kind(config(vocab_size=size, hidden_size=16, **changed)).save_pretrained(folder)
    return {"path": str(folder)}


def test_positions_and_sliding_windows_of_an_llm(models: Path, tmp_path: Path) -> None:
    """Beyond a sliding window, losses and label scores would see different tokens."""
    bloom = llm_folder(models, tmp_path / "bloom", BloomForCausalLM, BloomConfig, n_layer=1, n_head=2)
    assert "is a bloom model, which takes no positions" in refusal(models, llm=bloom)
    shape = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tmp_path / "mistral"
    mistral = llm_folder(models, folder, MistralForCausalLM, MistralConfig, **shape, sliding_window=12)
    assert make(models, llm=mistral).max_positions == 12


def test_learned_vectors_start_as_large_as_the_embeddings(models: Path, tmp_path: Path) -> None:
    """Gemma 3 multiplies the weights of its embedding layer by the square root of the width, 4 here."""
    shape = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    gemma = llm_folder(models, tmp_path / "gemma", Gemma3ForCausalLM, Gemma3TextConfig, **shape)
    plain = {"path": str(models / "llm")}
    for llm, factor in ((plain, 1), (plain | {"dtype": "bfloat16"}, 1), (gemma, 4)):
        model = make(models, device="cpu", llm=llm)
        layer = model.llm.get_input_embeddings()
        assert embedding_scale(layer) == pytest.approx(factor * layer.weight.float().std().item(), rel=1e-6 * factor)
        torch.manual_seed(0)
        vector = model._learned_vector()
        torch.manual_seed(0)
        assert torch.equal(vector, torch.randn(len(vector)) * embedding_scale(layer))


def test_wildcard_that_matches_the_encoder_trains_it(models: Path) -> None:
    encoder = {"path": str(models / "hubert-layer")}
    message = refusal(models, trainable="*", encoder=encoder | {"dtype": "bfloat16"})
    assert message.startswith("model.encoder.dtype: bfloat16 is for an encoder that stays frozen")
    config = settings(models, trainable="*", encoder=encoder | {"spec_augment": 0.1})
    assert config.problems() == []
    assert settings(models, trainable="lora", encoder=encoder | {"spec_augment": 0.1}).problems() != []
