"""Training parts of a model: the others do not change, and no trial leaves a trace in the next."""

from pathlib import Path

import pytest
import torch
from torch import nn

from data.shards.dataset import Shards
from model.encoders.loading import load_encoder
from model.parts import part_of
from model.speech_llm.language_model import load_llm
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, settings
from tests.model.parts import LORA, NEW, selected, trained


def bases(models: Path, kind: str) -> list[nn.Parameter]:
    """The parameters that all trials of a process share."""
    loaded = load_llm(str(models / "llm"), "float32", "cpu"), load_encoder(str(models / kind), "cpu", "float32")
    return [parameter for base in loaded for parameter in base.parameters()]


@pytest.mark.parametrize(
    ("kind", "trainable"),
    [
        ("whisper", NEW),
        ("hubert-group", f"{NEW}+encoder"),
        ("hubert-layer", f"{NEW}+encoder.*.layers.1.*+llm.*.layers.1.*"),
        ("hubert-layer", f"{NEW}+llm"),
    ],
)
def test_base_weights_are_shared_and_never_changed(
    kind: str, trainable: str, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    """What trains is a copy; what does not is the same tensor in all trials, unchanged."""
    shared = bases(models, kind)
    before = [(tensor.clone(), tensor._version, tensor.requires_grad) for tensor in shared]
    start = SpeechLLM(settings(models, kind, trainable=trainable), ANSWERS)
    old = {name: tensor.clone() for name, tensor in start.named_parameters()}
    model = trained(settings(models, kind, trainable=trainable), corpus, tmp_path)
    for tensor, (value, version, flag) in zip(shared, before, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor._version, tensor.requires_grad, tensor.grad) == (version, flag, None)
    pointers = {tensor.data_ptr() for tensor in shared}
    for name, tensor in model.named_parameters():
        based = part_of(name) in ("encoder", "llm")
        assert (tensor.data_ptr() in pointers) == (based and not tensor.requires_grad), name
        if based and not tensor.requires_grad:
            assert torch.equal(tensor, old[name])
    moved = {part_of(name) for name, tensor in model.named_parameters() if not torch.equal(tensor, old[name])}
    assert moved & {"encoder", "llm"} == {part for part in ("encoder", "llm") if part in trainable}


def test_tied_embeddings_stay_tied_when_they_train(models: Path, corpus: Shards, tmp_path: Path) -> None:
    base = load_llm(str(models / "llm"), "float32", "cpu")
    before = base.get_input_embeddings().weight.clone()
    config = settings(models, "whisper", trainable=f"{NEW}+*embed_tokens*", lora=LORA)
    model = trained(config, corpus, tmp_path)
    weight = model.llm.get_input_embeddings().weight
    assert model.llm.get_output_embeddings().weight is weight
    assert weight.data_ptr() != base.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(weight, before)
    assert torch.equal(base.get_output_embeddings().weight, before)
    assert sum("embed_tokens" in name or "lm_head" in name for name in selected(model)) == 1


def test_trial_leaves_no_trace_in_the_next(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """No LoRA layers, hooks, flags or gradients."""
    base = load_llm(str(models / "llm"), "float32", "cpu")

    def hooks() -> list[int]:
        """Return the number of hooks of every module: transformers adds some where a teacher returns hidden states."""
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()]

    before, checked = hooks(), {"path": str(models / "llm"), "gradient_checkpointing": True}
    trained(settings(models, "whisper", trainable=f"{NEW}+encoder+llm", llm=checked), corpus, tmp_path)
    assert not [name for name, _ in base.named_parameters() if "lora" in name]
    assert not [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
    assert hooks() == before
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
