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
from model.checkpoints import peft_export
from model.checkpoints.checkpoint import CheckpointError
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from tests.model.common import ANSWERS, build, settings
from tests.model.trials import Trial

SOURCE = peft_export.ExportSource("s", 3, "synthetic", "abc", {"client": ("change",)})
LORA: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "alpha_ratio": {"alpha_ratio": 0.5},
    "all-linear": {"targets": "all-linear"},
}
TRAINED = {
    "dora": {"lora": {"rank": 4, "dora": True}},
    "upper-encoder": {"trainable": "new+encoder.*.layers.1.*"},
    "llm-and-lora": {"trainable": "new+llm"},
    "no-lora": {"trainable": "adapter+tokens", "lora": {"enabled": False}},
    "text": {"modality": "text", "trainable": "lora", "end_of_audio": "none", "cls": "none"},
}


def write(model: SpeechLLM, folder: Path) -> Path:
    folder.mkdir()
    peft_export.write(model, folder, SOURCE)
    return folder


def trained(models: Path, kind: str = "hubert-layer", **changed: Any) -> SpeechLLM:
    """A model all of whose parameters differ from those they start with, as after training."""
    model = build(models, kind, **changed)
    with torch.no_grad():
        for parameter in (tensor for tensor in model.parameters() if tensor.requires_grad):
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("variant", LORA)
def test_peft_computes_what_the_trial_computes(variant: str, models: Path, tmp_path: Path) -> None:
    model = trained(models, lora={"rank": 4, "alpha": 24, "dropout": 0.1} | LORA[variant])
    folder = write(model, tmp_path / "exported")
    base = AutoModelForCausalLM.from_pretrained(models / "llm")
    ids = torch.tensor([[1, 5, 9, 4, 7]])
    plain = base(ids).logits
    peft = PeftModel.from_pretrained(base, folder / "lora").eval()
    torch.testing.assert_close(peft(ids).logits, model.llm(ids).logits, rtol=1e-5, atol=1e-5)
    assert (peft(ids).logits - plain).abs().max() > 0.01, "LoRA must change something for this to test anything"
    config = json.loads((folder / "lora/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (str(models / "llm"), True)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {path.name for path in (folder / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {"lora", "speech.safetensors", "labels.json"}


@pytest.mark.parametrize("variant", TRAINED)
def test_model_that_starts_from_an_export_is_the_same(variant: str, models: Path, tmp_path: Path) -> None:
    model = trained(models, "whisper", **TRAINED[variant])
    folder = write(model, tmp_path / "exported")
    seed_everything(99)  # all else random is loaded
    again = SpeechLLM(settings(models, "whisper", **TRAINED[variant], init_from=str(folder)), ANSWERS)
    expected, loaded = dict(model.named_parameters()), dict(again.named_parameters())
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    assert again.parents == [{"path": str(folder), "digest": peft_export.read(folder).digest}]
    assert (folder / "lora").exists() == model.config.lora.enabled
    names = set(load_file(folder / "speech.safetensors"))
    assert names == {name for name in peft_export.exported_tensors(model) if "lora_" not in name}


def test_export_contains_what_an_earlier_trial_trained(models: Path, corpus: Shards, tmp_path: Path) -> None:
    first = Trial(model={"trainable": "adapter+tokens", "lora": {"enabled": False}})
    first.run(models, corpus, tmp_path / "first")
    second, _ = Trial(model={"trainable": "lora", "init_from": str(tmp_path / "first")}, seed=8).start(models, corpus)
    folder = write(second, tmp_path / "exported")
    shutil.rmtree(tmp_path / "first")
    assert set(load_file(folder / "speech.safetensors")) == {
        *("adapter.linear.weight", "adapter.linear.bias", "end_of_audio", "cls")
    }
    third, _ = Trial(model={"trainable": "lora", "init_from": str(folder)}, seed=9).start(models, corpus)
    expected, loaded = dict(second.named_parameters()), dict(third.named_parameters())
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_damaged_export_is_refused(models: Path, tmp_path: Path) -> None:
    folder = write(build(models), tmp_path / "exported")
    assert peft_export.read(folder).answer_sets() == ANSWERS
    tensors = load_file(folder / "speech.safetensors")
    save_file({**tensors, "cls": tensors["cls"] + 1}, folder / "speech.safetensors")
    with pytest.raises(CheckpointError, match=r"its weights are not those that labels\.json describes; export"):
        peft_export.load_state(folder)
    (folder / "speech.safetensors").unlink()
    with pytest.raises(CheckpointError, match="its weights cannot be read"):
        peft_export.load_state(folder)
    (folder / "labels.json").write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match=r"labels\.json: format: Input should be 1; export the trial again"):
        peft_export.read(folder)
