"""Exported models: PEFT reads the LoRA weights, and all of it together is the model that was written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.shards.dataset import Shards
from model.checkpoints import peft_export as exported
from model.checkpoints.checkpoint import CheckpointError
from model.checkpoints.warm_start import chain
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from tests.model.common import ANSWERS, build, settings
from tests.model.trials import Trial

SAID = {"sweep": "s", "trial": 3, "corpus": "synthetic", "fingerprint": "abc", "roles": {"client": ("change",)}}
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "rslora-dora": {"rslora": True, "dora": True},
    "alpha_ratio": {"alpha_ratio": 0.5},
    "all-linear": {"targets": "all-linear"},
}
TRAINED = {
    "new": {},
    "frozen-encoder": {"trainable": "adapter+lora+tokens"},
    "upper-encoder": {"trainable": "new+encoder.*.layers.1.*"},
    "llm-and-lora": {"trainable": "new+llm"},
    "no-lora": {"trainable": "adapter+tokens", "lora": {"enabled": False}},
    "text": {"modality": "text", "trainable": "lora", "end_of_audio": "none", "cls": "none"},
}


def write(model: SpeechLLM, folder: Path) -> Path:
    folder.mkdir()
    exported.write(model, folder, SAID)
    return folder


def disturbed(models: Path, kind: str = "hubert-layer", **changed: Any) -> SpeechLLM:
    """A model all of whose own parameters differ from those they start with, as after training."""
    model = build(models, kind, **changed)
    with torch.no_grad():
        for parameter in (own for own in model.parameters() if own.requires_grad):
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("variant", LORA)
def test_peft_computes_what_the_trial_computes(variant: str, models: Path, tmp_path: Path) -> None:
    model = disturbed(models, lora={"rank": 4, "alpha": 24, "dropout": 0.1} | LORA[variant])
    folder = write(model, tmp_path / "exported")
    base = AutoModelForCausalLM.from_pretrained(models / "llm")
    ids = torch.tensor([[1, 5, 9, 4, 7]])
    plain = base(ids).logits
    peft = PeftModel.from_pretrained(base, folder / "lora").eval()
    torch.testing.assert_close(peft(ids).logits, model.llm(ids).logits, rtol=1e-5, atol=1e-5)
    assert (peft(ids).logits - plain).abs().max() > 0.01, "LoRA must change something for this to test anything"
    said = json.loads((folder / "lora/adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["inference_mode"]) == (str(models / "llm"), True)
    assert {path.name for path in (folder / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("variant", TRAINED)
def test_a_model_that_starts_from_it_is_the_same(variant: str, models: Path, tmp_path: Path) -> None:
    model = disturbed(models, "whisper", **TRAINED[variant])
    folder = write(model, tmp_path / "exported")
    seed_everything(99)  # all else random is loaded
    again = SpeechLLM(settings(models, "whisper", **TRAINED[variant], init_from=str(folder)), ANSWERS)
    own, other = dict(model.named_parameters()), dict(again.named_parameters())
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert again.parents == [{"path": str(folder), "digest": exported.read(folder).digest}]
    assert (folder / "lora").exists() == model.config.lora.enabled
    named = set(load_file(folder / "speech.safetensors"))
    assert named == {name for name in exported.own_weights(model) if "lora_" not in name}


def test_what_a_former_trial_trained_is_in_it(models: Path, corpus: Shards, tmp_path: Path) -> None:
    first = Trial(model={"trainable": "adapter+tokens", "lora": {"enabled": False}})
    first.run(models, corpus, tmp_path / "first")
    second, _ = Trial(model={"trainable": "lora", "init_from": str(tmp_path / "first")}, seed=8).start(models, corpus)
    folder = write(second, tmp_path / "exported")
    shutil.rmtree(tmp_path / "first")
    assert set(load_file(folder / "speech.safetensors")) == {
        *("adapter.linear.weight", "adapter.linear.bias", "end_of_audio", "cls")
    }
    third, _ = Trial(model={"trainable": "lora", "init_from": str(folder)}, seed=9).start(models, corpus)
    own, other = dict(second.named_parameters()), dict(third.named_parameters())
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_stage_on_an_exported_model_knows_it(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """A trial that starts from it can be started from, and notices that it has changed."""
    folder = write(disturbed(models, "whisper", trainable="adapter+lora+tokens"), tmp_path / "exported")
    Trial(model={"init_from": str(folder)}).run(models, corpus, tmp_path / "next")
    assert chain(str(tmp_path / "next")).links[0]["path"] == str(folder)
    shutil.rmtree(folder)
    write(disturbed(models, "whisper", seed=1, trainable="adapter+lora+tokens"), folder)
    with pytest.raises(CheckpointError, match="has changed since"):
        chain(str(tmp_path / "next"))


def test_what_is_not_whole_is_refused(models: Path, tmp_path: Path) -> None:
    folder = write(build(models), tmp_path / "exported")
    assert exported.read(folder).answer_sets() == ANSWERS
    tensors = load_file(folder / "speech.safetensors")
    save_file({**tensors, "cls": tensors["cls"] + 1}, folder / "speech.safetensors")
    with pytest.raises(CheckpointError, match=r"its weights are not those that labels\.json tells of; export"):
        exported.as_state(folder)
    (folder / "speech.safetensors").unlink()
    with pytest.raises(CheckpointError, match="its weights cannot be read"):
        exported.as_state(folder)
    (folder / "labels.json").write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match=r"labels\.json: format: Input should be 1; export the trial again"):
        exported.read(folder)
