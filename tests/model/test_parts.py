"""Parts: what trains is what the configuration names, and nothing else is ever written to."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from data.config import DataConfig, TaskWeights
from data.errors import ConfigError
from data.shards import Shards
from model.checkpoint import trained_tensors
from model.config import ModelConfig, TrainConfig
from model.encoder import load_encoder
from model.evaluate import TrialData
from model.llm import load_llm
from model.parts import part_of, parts
from model.speech_llm import SpeechLLM
from model.train import fit
from tests.conftest import ENCODERS
from tests.model.common import ANSWERS, build, settings

NEW = "adapter+lora+tokens"
LORA = {"rank": 4, "dropout": 0.0}
LLM_WIDTH, ENCODER_WIDTH = 32, 32


def make(models: Path, kind: str = "hubert-layer", device: str = "meta", **changed: Any) -> SpeechLLM:
    return SpeechLLM(settings(models, kind, **changed), ANSWERS, device)


def selected(model: SpeechLLM) -> set[str]:
    return set(trained_tensors(model))


def all_names(model: nn.Module, start: str = "") -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(start)}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("encoder.model.encoder.layers.1.attention.k_proj.weight", "encoder"),
        ("adapter.linear.weight", "adapter"),
        ("llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "lora"),
        ("llm.base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight", "lora"),
        ("llm.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", "llm"),
        ("llm.model.embed_tokens.weight", "llm"),
        ("end_of_audio", "tokens"),
        ("cls", "tokens"),
    ],
)
def test_every_parameter_has_a_part(name: str, part: str) -> None:
    assert part_of(name) == part


FROZEN_IN_HUBERT = "encoder.model.feature_extractor."


def test_parts_select_their_parameters(models: Path) -> None:
    model = make(models, trainable="encoder+adapter+lora+tokens")
    names = all_names(model)
    encoder = all_names(model, "encoder.") - all_names(model, FROZEN_IN_HUBERT)
    lora = {name for name in names if "lora_" in name}
    assert selected(model) == encoder | all_names(model, "adapter.") | lora | {"end_of_audio", "cls"}
    assert len(lora) == 2 * 2 * 2  # A and B of q_proj and v_proj in two layers
    assert selected(make(models, trainable=NEW)) == selected(model) - encoder
    assert make(models, trainable=["adapter", "lora", "tokens"]).config.trainable == NEW


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
    expected = {name for place in "01" for name in all_names(model, start.replace("?", place))}
    assert selected(model) - selected(make(models, trainable=NEW)) == expected
    assert expected


def test_the_llm_by_its_name_is_all_of_it_but_lora(models: Path) -> None:
    model = make(models, trainable=f"{NEW}+llm")
    assert selected(model) == all_names(model) - all_names(model, "encoder.")
    plain = make(models, trainable="adapter+tokens+llm", lora={"enabled": False})
    assert selected(plain) >= all_names(plain, "llm.")


def test_parts_that_a_model_lacks_select_nothing(models: Path) -> None:
    text = make(models, trainable="encoder+adapter+lora+tokens", modality="text", end_of_audio="none")
    assert {part_of(name) for name in selected(text)} == {"lora", "tokens"}
    assert selected(text) - {name for name in selected(text) if "lora_" in name} == {"cls"}
    speech = make(models, trainable=NEW, modality="speech", lora={"enabled": False}, cls="none", end_of_audio="none")
    assert selected(speech) == {"adapter.linear.weight", "adapter.linear.bias"}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("trainable", ["encoder", "encoder.*"])
def test_the_first_convolutions_of_an_encoder_never_train(trainable: str, kind: str, models: Path) -> None:
    model = make(models, kind, trainable=f"{NEW}+{trainable}")
    trained = {name for name in selected(model) if name.startswith("encoder.")}
    assert trained
    assert not [name for name in trained if "feature_extractor" in name or ".conv1." in name or ".conv2." in name]


@pytest.mark.parametrize("pattern", ["encodr", "encoder.layers.9.*", "llm.*.layers.7.*", "*.feature_extractor.*"])
def test_an_unknown_pattern_is_an_error(pattern: str, models: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make(models, trainable=f"{NEW}+{pattern}")
    message = str(error.value)
    assert message.startswith(
        f"model.trainable: {pattern!r} matches no parameter that can train; use encoder, adapter,"
    )
    assert "\n" not in message


def test_nothing_to_train_is_an_error(models: Path) -> None:
    bare = {"modality": "text", "cls": "none", "end_of_audio": "none"}
    with pytest.raises(ConfigError, match=r"^model\.trainable: encoder\+adapter leaves nothing to train") as error:
        make(models, **bare, trainable="encoder+adapter", lora={"enabled": False})
    assert "\n" not in str(error.value)


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
def test_what_would_stay_random_is_refused(changed: dict[str, Any], part: str, name: str, models: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make(models, **changed)
    message = str(error.value)
    assert message.startswith(f"model.trainable: {part} is frozen and was never loaded, so ")
    assert f"{name} would stay random; add {part} to model.trainable, load it with" in message
    assert ("model.adapter.init_from or" in message) == (part == "adapter")
    assert "\n" not in message


def test_llm_weights_of_low_precision_cannot_train(models: Path) -> None:
    half = {"path": str(models / "llm"), "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"^model\.llm\.dtype: bfloat16 is for weights that stay frozen") as error:
        make(models, trainable=f"{NEW}+llm.*.layers.1.*", llm=half)
    assert "\n" not in str(error.value)
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
def test_the_table_counts_every_parameter_once(name: str, models: Path) -> None:
    """And needs no weights."""
    changed = dict(TABLES[name])
    if "encoder" in changed:
        changed["encoder"] = {"path": str(models / "whisper")}
    model = make(models, device="cpu", **changed)
    rows = parts(model)
    assert rows == parts(make(models, device="meta", **changed))
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
def test_the_scale_of_lora(changed: dict[str, Any], scale: float, models: Path) -> None:
    """By what is added to a layer's output, which no name in PEFT has to be trusted for."""
    model = build(models, modality="text", end_of_audio="none", lora={"dropout": 0.0} | changed)
    layer = model.llm.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    x_TE = torch.randn(3, LLM_WIDTH)
    with torch.no_grad():
        update = layer(x_TE) - layer.base_layer(x_TE)
        expected = x_TE @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    assert torch.allclose(update, scale * expected, atol=1e-5)
    assert update.abs().max() > 1e-3


def test_unknown_lora_targets_are_named(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.lora\.targets: c_attn match no linear layer; the LLM has .*q_proj"):
        make(models, lora={"targets": ["q_proj", "c_attn"]})


def bases(models: Path, kind: str) -> list[nn.Parameter]:
    """The parameters that all trials of a process share."""
    loaded = load_llm(str(models / "llm"), "float32", "cpu"), load_encoder(str(models / kind), "cpu", "float32")
    return [parameter for base in loaded for parameter in base.parameters()]


def trained(config: ModelConfig, corpus: Shards, folder: Path) -> SpeechLLM:
    model = SpeechLLM(config, {"classify": ANSWERS["classify"]})
    data = TrialData.open(corpus, model, DataConfig(history=2), ("train", "val"))
    train = TrainConfig(epochs=1, batch_size=8, learning_rate=3e-3)
    fit(model, data, train, TaskWeights(), 0, folder, lambda epoch, metrics: None)
    return model


@pytest.mark.parametrize(
    ("kind", "trainable"),
    [
        ("whisper", NEW),
        ("whisper", f"{NEW}+encoder"),
        ("hubert-group", f"{NEW}+encoder"),
        ("hubert-layer", f"{NEW}+encoder.*.layers.1.*+llm.*.layers.1.*"),
        ("hubert-layer", f"{NEW}+llm"),
    ],
)
def test_base_weights_are_shared_and_never_written_to(
    kind: str, trainable: str, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    """What trains is a copy; what does not is the very tensor of every other trial, as it was."""
    shared = bases(models, kind)
    before = [(tensor.clone(), tensor._version, tensor.requires_grad) for tensor in shared]
    start = SpeechLLM(settings(models, kind, trainable=trainable), ANSWERS)
    old = {name: tensor.clone() for name, tensor in start.named_parameters()}
    model = trained(settings(models, kind, trainable=trainable), corpus, tmp_path)
    for tensor, (value, version, flag) in zip(shared, before, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor._version, tensor.requires_grad, tensor.grad) == (version, flag, None)
    own = {tensor.data_ptr() for tensor in shared}
    for name, tensor in model.named_parameters():
        based = part_of(name) in ("encoder", "llm")
        assert (tensor.data_ptr() in own) == (based and not tensor.requires_grad), name
        if based and not tensor.requires_grad:
            assert torch.equal(tensor, old[name])
    moved = {part_of(name) for name, tensor in model.named_parameters() if not torch.equal(tensor, old[name])}
    assert moved & {"encoder", "llm"} == {part for part in ("encoder", "llm") if part in trainable}


@pytest.mark.parametrize("lora", [LORA, {"enabled": False}], ids=["lora", "plain"])
def test_tied_embeddings_stay_tied_when_they_train(
    lora: dict[str, Any], models: Path, corpus: Shards, tmp_path: Path
) -> None:
    base = load_llm(str(models / "llm"), "float32", "cpu")
    before = base.get_input_embeddings().weight.clone()
    config = settings(models, "whisper", trainable=f"{NEW}+*embed_tokens*", lora=lora)
    model = trained(config, corpus, tmp_path)
    weight = model.llm.get_input_embeddings().weight
    assert model.llm.get_output_embeddings().weight is weight
    assert weight.data_ptr() != base.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(weight, before)
    assert torch.equal(base.get_output_embeddings().weight, before)
    assert sum("embed_tokens" in name or "lm_head" in name for name in selected(model)) == 1


def test_a_trial_leaves_no_trace_in_the_next(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Its LoRA layers, hooks, flags and gradients are its own."""
    checked = {"path": str(models / "llm"), "gradient_checkpointing": True}
    trained(settings(models, "whisper", trainable=f"{NEW}+encoder+llm", llm=checked), corpus, tmp_path)
    base = load_llm(str(models / "llm"), "float32", "cpu")
    assert not [name for name, _ in base.named_parameters() if "lora" in name]
    assert not [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
    assert not [module for module in base.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not [module for module in base.modules() if module.training]
    plain = SpeechLLM(
        settings(models, "whisper", modality="text", end_of_audio="none", lora={"enabled": False}), ANSWERS
    )
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    assert selected(plain) == {"cls"}


@pytest.mark.parametrize(
    ("trainable", "learning"),
    [
        ("adapter+lora+tokens", {"adapter", "llm"}),
        ("encoder+adapter+lora+tokens", {"encoder", "adapter", "llm"}),
        ("adapter+tokens+llm.*.layers.1.*", {"adapter", "llm"}),
        ("adapter+tokens", {"adapter"}),
    ],
)
def test_frozen_parts_keep_their_dropout_off(trainable: str, learning: set[str], models: Path) -> None:
    lora = {"enabled": "lora" in trainable}
    model = SpeechLLM(settings(models, "hubert-layer", trainable=trainable, lora=lora), ANSWERS).train()
    children = {name: child for name, child in model.named_children() if list(child.parameters())}
    assert {name for name, child in children.items() if child.training} == learning
    for name, child in children.items():
        if name not in learning:
            assert not any(module.training for module in child.modules())
    assert not any(module.training for module in model.eval().modules())


def test_the_table_says_where_weights_come_from(models: Path) -> None:
    sources = {row.name: row.loaded for row in parts(make(models))}
    assert sources == {
        "encoder": str(models / "hubert-layer"),
        "llm": str(models / "llm"),
        "adapter": "",
        "lora": "",
        "tokens": "",
    }


def test_an_llm_without_all_of_its_weights_is_refused(models: Path, tmp_path: Path) -> None:
    """Random ones would stand in for them."""
    folder = Path(shutil.copytree(models / "llm", tmp_path / "llm"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    whole = tensors.pop(name)

    def message() -> str:
        with pytest.raises(ConfigError) as error:
            load_llm.__wrapped__(str(folder), "float32", "cpu")
        assert "\n" not in str(error.value)
        return str(error.value)

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert (
        message() == f"model.llm.path: {folder} lacks 1 of the LLM's tensors ({name}, ...); use a complete checkpoint"
    )
    save_file(tensors | {name: whole[:3]}, folder / "model.safetensors", metadata={"format": "pt"})
    assert message().startswith(f"model.llm.path: cannot load a causal LM from {folder}: ")
    (folder / "model.safetensors").write_bytes(b"half a file")
    assert message().startswith(f"model.llm.path: cannot load a causal LM from {folder}: ")


def test_llms_that_take_no_positions_are_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llm", tmp_path / "bloom")
    size = json.loads((models / "llm" / "config.json").read_text())["vocab_size"]
    BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "bloom"
    )
    with pytest.raises(ConfigError, match=r"model\.llm\.path: .* is a bloom model, which takes no positions"):
        make(models, llm={"path": str(tmp_path / "bloom")})


def test_a_sliding_window_is_the_reach_of_an_llm(models: Path, tmp_path: Path) -> None:
    """Beyond it, losses and label scores would see different tokens."""
    shutil.copytree(models / "llm", tmp_path / "mistral")
    size = json.loads((models / "llm" / "config.json").read_text())["vocab_size"]
    shape = {"vocab_size": size, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = MistralConfig(**shape, num_attention_heads=2, num_key_value_heads=1, sliding_window=12)
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    assert make(models, llm={"path": str(tmp_path / "mistral")}).reach == 12


def test_a_wildcard_that_trains_the_encoder_counts_as_training_it(models: Path) -> None:
    encoder = {"path": str(models / "hubert-layer")}
    with pytest.raises(ConfigError, match=r"model\.encoder\.dtype: bfloat16 is for an encoder that stays frozen"):
        make(models, trainable="*", encoder=encoder | {"dtype": "bfloat16"})
    config = settings(models, trainable="*", encoder=encoder | {"spec_augment": 0.1})
    assert config.problems() == []
    assert settings(models, trainable="lora", encoder=encoder | {"spec_augment": 0.1}).problems() != []
