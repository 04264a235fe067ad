"""Families of language models: each is equal at any batch size, trains, exports and reloads, or is refused before.

The reference of a score is one pass for each label over one unpadded example, without a cache.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data.errors import ConfigError
from data.loading.examples import Example
from model.checkpoints import peft_export
from model.config import LLMConfig, LossConfig
from model.evaluation.llm_check import Findings, check_llm, examine, resolve_packing
from model.evaluation.scoring import label_scores
from model.objectives.losses import Share, answer_losses
from model.speech_llm.language_model import expert_weights, lora_reach
from model.speech_llm.packing import set_packing
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from tests.model.common import ANSWERS, close, perturb_lora, settings, soft_targets
from tests.model.families import REFUSED, SUPPORTED, UNPACKED, make
from tests.model.test_scoring import naive_score

SOURCE = peft_export.ExportSource("s", 3, "synthetic", "abc", {"client": ("change",)})
BARE = {"modality": "text", "trainable": "lora+tokens", "end_of_audio": "none"}
USUAL = ("qwen3", "gemma3_text", "phi3", "gpt2", "opt", "falcon", "mixtral", "deepseek_v3", "gpt_oss")
ALL, NONE = Share(1.0, 1.0), Share(0.0, 0.0)
EXPERTS = ["q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj"]


def build(folder: Path, device: str = "cpu", **changed: Any) -> SpeechLLM:
    lora = {"rank": 4, "dropout": 0.0, "targets": "all-linear"} | changed.pop("lora", {})
    config = settings(folder, **BARE, llm={"path": str(folder)}, lora=lora, **changed)
    seed_everything(0)
    return SpeechLLM(config, {"classify": ANSWERS["classify"]}, device).eval()


def sixteen(examples: list[Example]) -> list[Example]:
    """Sixteen dialogues of 1 to 4 turns, read as text."""
    shorter = [replace(example, turns=example.turns[-1:], audio_turn=0) for example in examples]
    return [*examples, *shorter]


def check_family(folder: Path, examples: list[Example], exported: Path, **changed: Any) -> None:
    model, batch = perturb_lora(build(folder, **changed)), sixteen(examples)
    packs = model.llm.config.model_type not in UNPACKED
    with contextlib.nullcontext() if packs else pytest.raises(ConfigError, match="packing"):
        assert resolve_packing(model.config, "on", "cpu")
    with torch.no_grad():
        alone_BK = torch.cat([label_scores(model, [example]) for example in batch])
        assert close(label_scores(model, batch), alone_BK)
        assert close(
            alone_BK[3], torch.stack([naive_score(model, batch[3], a) for a in model.answers["classify"].values()])
        )
        set_packing(model.llm, packs)
        assert close(label_scores(model, batch), alone_BK)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    model.train()
    losses_B = answer_losses(model, batch, LossConfig()).next_token_B
    truth_B = torch.tensor([list(model.tasks["classify"].labels).index(example.answer) for example in batch])
    assert close(-losses_B.detach(), alone_BK.gather(1, truth_B[:, None])[:, 0])
    soft = [target or {example.answer: ALL} for example, target in zip(batch, soft_targets(batch), strict=True)]
    votes_B = answer_losses(model, batch, LossConfig(), soft).next_token_B
    labels = list(model.tasks["classify"].labels)
    shares_BK = torch.tensor([[target.get(label, NONE).share for label in labels] for target in soft])
    assert close(votes_B.detach(), -(shares_BK * alone_BK).sum(1))
    losses_B.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    optimizer.step()
    model.eval()
    after_B = answer_losses(model, batch, LossConfig()).next_token_B
    assert after_B.sum() < losses_B.sum()
    exported.mkdir()
    peft_export.write(model, exported, SOURCE)
    set_packing(model.llm, packs=False)  # as the one that is loaded
    with torch.no_grad():
        assert torch.equal(
            label_scores(build(folder, init_from=str(exported), **changed), batch), label_scores(model, batch)
        )


@pytest.mark.parametrize(
    "family", [name if name in USUAL else pytest.param(name, marks=pytest.mark.long) for name in SUPPORTED]
)
def test_family_scores_trains_exports_and_reloads(family: str, examples: list[Example], tmp_path: Path) -> None:
    folder = make(family, tmp_path / "llm")
    assert check_llm(LLMConfig(path=str(folder))), "the check must not skip a family that works"
    check_family(folder, examples, tmp_path / "exported")


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_cannot_work_is_refused(family: str, tmp_path: Path) -> None:
    """Without weights, in one line that names the family."""
    folder = make(family, tmp_path)
    with pytest.raises(ConfigError) as error:
        build(folder, "meta", lora={"enabled": False}, cls="before")
        check_llm(LLMConfig(path=str(folder)))
    message = str(error.value)
    assert message.startswith(f"model.llm.path: {folder} is a {family.removesuffix('-alibi')} model, which ")
    assert REFUSED[family][0] in message
    assert "\n" not in message


def test_refused_family_would_have_computed_other_scores(examples: list[Example], tmp_path: Path) -> None:
    """Nothing raises in a family with a recurrent state: its scores are only wrong."""
    model = build(make("lfm2", tmp_path))
    scores_K = label_scores(model, examples[:1])[0]
    expected_K = torch.stack([naive_score(model, examples[0], a) for a in model.answers["classify"].values()])
    assert not close(scores_K, expected_K, tolerance=1e-3)


@pytest.mark.parametrize(("family", "linear_misses"), [("mixtral", False), ("gpt_oss", True)])
def test_lora_reaches_experts_that_are_named(
    family: str, linear_misses: bool, examples: list[Example], tmp_path: Path
) -> None:
    """PEFT counts the experts of Mixtral, which were linear layers once, as linear; those of other families not."""
    folder = make(family, tmp_path / "llm")
    reaches = {}
    for name, targets in (("linear", "all-linear"), ("experts", EXPERTS), ("attention", EXPERTS[:2])):
        reach = lora_reach(build(folder, "meta", lora={"targets": targets}).llm)
        assert reach is not None
        assert expert_weights(build(folder, "meta", lora={"targets": targets}).llm) == set(EXPERTS[2:])
        reaches[name] = reach
    missing = {name: reach.misses_experts for name, reach in reaches.items()}
    assert missing == {"linear": linear_misses, "experts": False, "attention": True}
    assert (reaches["linear"].share < 0.5) == linear_misses
    assert reaches["attention"].share < 0.5 < reaches["experts"].share
    assert {name for name, _ in reaches["attention"].missed} >= set(EXPERTS[2:])
    assert set(reaches["experts"].reached) >= set(EXPERTS[2:])
    check_family(folder, examples, tmp_path / "exported", lora={"targets": EXPERTS})
    with pytest.raises(ConfigError, match=r"experts\.down_proj are fused experts, for which LoRA has neither dropout"):
        build(folder, "meta", lora={"targets": EXPERTS, "dropout": 0.1})
    if not linear_misses:
        with pytest.raises(
            ConfigError, match=r"all-linear cannot be adapted .*; set model\.lora\.dropout=0, or choose"
        ):
            build(folder, "meta", lora={"dropout": 0.1})
    with pytest.raises(ConfigError, match=r"expert\.down match no linear layer; .* fused experts: experts\.down_proj"):
        build(folder, "meta", lora={"targets": ["expert.down"]})


def test_reach_of_dense_model_counts_every_weight_once(tmp_path: Path) -> None:
    reach = lora_reach(build(make("gpt2", tmp_path), "meta").llm)
    assert reach is not None
    assert (reach.share, reach.missed, reach.misses_experts) == (1.0, (), False)
    assert lora_reach(build(tmp_path, "meta", lora={"enabled": False}).llm) is None


def test_rounding_does_not_look_like_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model of gpt-oss amplifies it to the tolerance; here the tolerance is smaller."""
    monkeypatch.setattr("model.evaluation.llm_check.TOLERANCE", 1e-7)
    assert examine(GPT2LMHeadModel, GPT2Config(n_layer=2)) == Findings("", packs=True)


@pytest.mark.long
@pytest.mark.parametrize("family", SUPPORTED)
def test_published_sizes_of_a_family_can_be_checked(family: str) -> None:
    """The defaults of transformers are the sizes of a published model."""
    if family in ("nemotron", "deepseek_v2"):
        pytest.skip("its defaults in transformers make no model that runs")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family))
    assert examine(type(model), model.config).problem == ""
    assert family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
