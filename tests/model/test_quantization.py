"""`model.llm.load_in`: quantized base models give the same numbers in every batch, train, and are merged exactly.

Without bitsandbytes only what is refused can be tested.
"""

from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.errors import ConfigError, UserError
from data.loading.examples import Example
from data.shards.dataset import Shards
from model.config import LossConfig
from model.evaluation.scoring import label_scores
from model.objectives.losses import answer_losses
from model.objectives.teacher import teacher_key
from model.speech_llm import quantization
from model.speech_llm.language_model import load_base, merge_lora
from model.speech_llm.quantization import dequantized, quantized_layers
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, build, close, settings
from tests.model.families import make
from tests.model.test_invariance import check_stages
from tests.model.trials import KilledError, Trial, kill_after, same_end

KINDS = ("8bit", "4bit")
quantizes = pytest.mark.skipif(
    util.find_spec("bitsandbytes") is None, reason="bitsandbytes, of the extra `quantized`, is not installed"
)


def test_quantization_without_its_library_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^model\.llm\.load_in: 4bit needs bitsandbytes, .* pip install 'speech-llm-"):
        SpeechLLM(settings(models, llm={"load_in": "4bit"}), ANSWERS, "meta")


@quantizes
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"trainable": "new+llm.*norm*"},
            r"^model\.llm\.load_in: 8bit is for an LLM whose weights stay .*norm\.weight",
        ),
        ({"trainable": "*"}, r"^model\.llm\.load_in: 8bit is for an LLM whose weights stay as they were published"),
    ],
)
def test_weights_of_a_quantized_llm_do_not_train(changed: dict[str, Any], message: str, models: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeechLLM(settings(models, llm={"load_in": "8bit"}, **changed), ANSWERS, "meta")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: dequantized(layer, torch.float32) for name, layer in quantized_layers(model)}


@quantizes
@pytest.mark.parametrize(("load_in", "error", "size"), [("8bit", 0.01, 1.0), ("4bit", 0.11, 0.5)])
def test_linear_layers_are_quantized(load_in: str, error: float, size: float, models: Path) -> None:
    """All but the LM head; NF4 has 16 values for a block, and an integer 255 for a row."""
    config = settings(models, llm={"load_in": load_in})
    stored = load_base(config.llm, "cpu")
    found, former = weights(stored), dict(load_base(settings(models).llm, "cpu").named_parameters())
    assert len(found) == 2 * 7
    assert not any("lm_head" in name for name in found)
    for name, weight in found.items():
        original = former[f"{name}.weight"]
        assert 0 < float((weight - original).norm() / original.norm()) < error
        assert stored.get_parameter(f"{name}.weight").nbytes == size * original.numel()
    shared = [layer.weight.data_ptr() for _, layer in quantized_layers(build(models, llm={"load_in": load_in}).llm)]
    assert shared == [layer.weight.data_ptr() for _, layer in quantized_layers(stored)]


@quantizes
@pytest.mark.parametrize("load_in", [pytest.param("8bit", marks=pytest.mark.long), "4bit"])
def test_quantized_stages_do_not_depend_on_the_batch(load_in: str, models: Path, examples: list[Example]) -> None:
    model = build(models, llm={"load_in": load_in})
    check_stages(["scores", "losses of replies"], model, examples, packed=(True, False))


@quantizes
@pytest.mark.parametrize("load_in", KINDS)
def test_gradients_are_those_of_the_stored_weights(load_in: str, models: Path, examples: list[Example]) -> None:
    """Also with gradient checkpointing."""

    def gradients(model: SpeechLLM) -> dict[str, Tensor]:
        answer_losses(model.train(), examples[:2], LossConfig()).next_token_B.sum().backward()
        return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}

    quantized = build(models, llm={"load_in": load_in, "gradient_checkpointing": True})
    plain = build(models)
    layers = dict(plain.llm.named_modules())
    for name, weight in weights(quantized.llm).items():
        layers[name].weight.data = weight
    found, expected = gradients(quantized), gradients(plain)
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    assert all(float((found[name] - expected[name]).abs().max()) <= 1e-5 * largest for name in expected)


@quantizes
@pytest.mark.parametrize(
    ("load_in", "lora"),
    [("4bit", {}), ("8bit", {"dora": True}), ("4bit", {"targets": ["q_proj"]})],
    ids=["4bit", "8bit, DoRA", "some layers"],
)
def test_merged_weights_score_as_the_quantized_ones(
    load_in: str, lora: dict[str, Any], models: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = build(models, llm={"load_in": load_in}, lora={"rank": 2, "dropout": 0.0} | lora)
    expected = label_scores(model, examples)
    model.llm = merge_lora(model.llm)
    assert not list(quantized_layers(model.llm))
    assert close(label_scores(model, examples), expected)
    model.llm.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()


@quantizes
@pytest.mark.long
def test_killed_trial_on_a_quantized_llm_resumes(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(model={"llm": {"load_in": "4bit"}, "modality": "text", "end_of_audio": "none"})
    trial.run(models, corpus, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, 5)
        trial.run(models, corpus, tmp_path / "killed")
    trial.run(models, corpus, tmp_path / "killed")
    assert same_end(tmp_path / "whole", tmp_path / "killed")


@quantizes
@pytest.mark.parametrize("family", ["gpt2", "qwen2_audio"])
def test_other_layouts_are_quantized(family: str, models: Path, tmp_path: Path) -> None:
    """GPT-2 stores its weights transposed, and an audio LLM has an encoder beside its language model."""
    path = models / "qwen2-audio" if family == "qwen2_audio" else make(family, tmp_path)
    config = settings(models, llm={"path": str(path), "load_in": "4bit"}).llm
    assert len(list(quantized_layers(load_base(config, "cpu")))) > 0


@quantizes
def test_teacher_is_the_quantized_llm(models: Path) -> None:
    """Logits of the others are found under the former key."""
    keys = [teacher_key(settings(models, llm={"load_in": kind}), 1.0, "cpu").key for kind in ("none", *KINDS)]
    assert len(set(keys)) == 3
