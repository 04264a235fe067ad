"""`model.lora.init_from`: LoRA that starts from a PEFT adapter computes what the adapter computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.errors import ConfigError
from data.loading.examples import Example
from model.checkpoints import checkpoint, peft_export
from model.config import ModelConfig
from model.evaluation.scoring import label_scores
from model.parts import part_of
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from tests.model.common import ANSWERS, perturb_lora, settings
from tests.model.families import make
from tests.model.test_families import EXPERTS, build
from tests.model.test_peft_export import trained, write

TEXT: dict[str, Any] = {"modality": "text", "trainable": "lora", "end_of_audio": "none", "cls": "none"}
LORA: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4},
    "rslora": {"rank": 4, "rslora": True},
    "dora": {"rank": 4, "dora": True},
    "alpha_ratio": {"rank": 4, "alpha_ratio": 0.5},
    "all-linear": {"rank": 4, "targets": "all-linear"},
}


def start(models: Path, folder: Path, device: str = "cpu", **changed: Any) -> SpeechLLM:
    """A model whose LoRA starts from a folder, and all else of it from another seed."""
    seed_everything(99)
    lora = {"rank": 4, "dropout": 0.0, "init_from": str(folder)} | changed.pop("lora", {})
    return SpeechLLM(settings(models, "whisper", **TEXT | changed, lora=lora), ANSWERS, device).eval()


@pytest.mark.parametrize("variant", LORA)
def test_lora_from_an_export_gives_equal_scores(
    variant: str, models: Path, tmp_path: Path, examples: list[Example]
) -> None:
    first = trained(models, "whisper", **TEXT, lora=LORA[variant])
    folder = write(first, tmp_path / "m") / "lora"
    again, plain = start(models, folder, lora=LORA[variant]), start(models, folder, lora={"init_from": None})
    expected, scores, other = (label_scores(model, examples) for model in (first, again, plain))
    assert all(map(torch.equal, scores, expected))
    assert not any(map(torch.equal, scores, other))
    assert again.sources["lora"] == str(folder)


@pytest.mark.parametrize("safe", [True, False])
def test_lora_from_peft_computes_the_same_logits(safe: bool, models: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "llm")
    peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["k_proj"])).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft.save_pretrained(tmp_path / "a")
    if not safe:
        torch.save(load_file(tmp_path / "a/adapter_model.safetensors"), tmp_path / "a/adapter_model.bin")
        (tmp_path / "a/adapter_model.safetensors").unlink()
    model = start(models, tmp_path / "a", lora={"targets": ["k_proj"]})
    ids = torch.tensor([[1, 5, 9, 4, 7]])
    torch.testing.assert_close(model.llm(ids).logits, peft(ids).logits, rtol=1e-6, atol=1e-6)


def test_lora_of_fused_experts_starts_from_an_export(examples: list[Example], tmp_path: Path) -> None:
    folder, lora = make("mixtral", tmp_path / "llm"), {"targets": EXPERTS}
    first = perturb_lora(build(folder, lora=lora))
    exported = write(first, tmp_path / "m") / "lora"
    again = build(folder, lora=lora | {"init_from": str(exported)})
    assert torch.equal(label_scores(again, examples), label_scores(first, examples))
    with pytest.raises(ConfigError, match=r"targets \[experts\.down_proj, experts\.gate_up_proj, q_proj, v_proj\]"):
        build(folder, "meta", lora={"targets": EXPERTS[:2], "init_from": str(exported)})


def test_lora_that_was_loaded_may_stay_frozen(models: Path, tmp_path: Path) -> None:
    first = trained(models, "whisper", **TEXT)
    folder = write(first, tmp_path / "m") / "lora"
    speech = {"modality": "speech", "trainable": "adapter+tokens"}
    with pytest.raises(ConfigError, match=r"load it with model\.lora\.init_from or model\.init_from"):
        start(models, folder, **speech, lora={"init_from": None})
    model = start(models, folder, **speech)
    assert {part_of(name) for name, x in model.named_parameters() if x.requires_grad} == {"adapter"}
    expected = {name: x for name, x in first.named_parameters() if part_of(name) == "lora"}
    exported = peft_export.exported_tensors(model)
    assert all(torch.equal(exported[name], x) for name, x in expected.items())
    assert model.files.keys() == {"model.lora.init_from"}
    state: Any = {"tensors": checkpoint.trained_tensors(model), "parents": [], "files": dict(model.files)}
    checkpoint.restore(model, state)
    model.files["model.lora.init_from"] = "another"
    with pytest.raises(checkpoint.CheckpointError, match=r"^model\.lora\.init_from: its file has changed"):
        checkpoint.restore(model, state)
    assert start(models, folder).files == {}, "a checkpoint holds LoRA that trains"


def test_structure_is_checked_without_weights(models: Path, tmp_path: Path) -> None:
    """So that a sweep that cannot start from an adapter ends before it begins."""
    adapted = {"rank": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    folder = write(trained(models, "whisper", **TEXT, lora=adapted), tmp_path / "m") / "lora"
    assert start(models, folder, "meta", lora=adapted).trained_parts == {"lora"}
    with pytest.raises(ConfigError, match=r"has rank 4, and the configuration rank 16; use --set model.lora.rank=4$"):
        start(models, folder, "meta", lora=adapted | {"rank": 16, "alpha": 128})
    message = r"adapts q_proj, v_proj, and model.lora.targets adapts .*; use --set 'model.lora.targets=\[q_proj, v_proj"
    with pytest.raises(ConfigError, match=message):
        start(models, folder, "meta", lora={"targets": "all-linear"})
    other = Path(shutil.copytree(models / "llm", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    for changed in ({"num_hidden_layers": 3}, {"hidden_size": 64}):
        (other / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ConfigError, match=r"was trained on another LLM: .* differs; set model\.llm"):
            start(models, folder, "meta", llm={"path": str(other)}, lora=adapted)
    with pytest.raises(ConfigError, match=r"and model\.init_from \(.*\) would start LoRA, too; remove one of them"):
        start(models, folder, init_from=str(folder.parent), lora=adapted)
    without = {"lora": {"enabled": False, "init_from": "a"}}
    [problem] = ModelConfig.model_validate(without).problems()
    assert problem == "model.lora.init_from: a has no effect with model.lora.enabled=false; remove one"
