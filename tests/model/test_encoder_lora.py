"""LoRA on the encoder: on every kind, above cached layers, in any batch, saved, exported and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import ConfigError
from data.loading.examples import Example
from data.shards.dataset import Shards
from model.checkpoints import peft_export
from model.checkpoints.checkpoint import CheckpointMisfitError, trained_tensors
from model.checkpoints.peft_export import ExportSource
from model.config import EncoderLora
from model.encoders.lora import add_lora, merged_tensors
from model.parts import part_of, summarise_parts
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, build, close, settings
from tests.model.encoders import CLIPS, encode, fresh, gradient, invariant, same
from tests.tiny_models import ENCODERS

NEW = "adapter+lora+tokens+encoder_lora"
LORA: dict[str, Any] = {"rank": 2, "targets": "all-linear", "alpha_ratio": 2.0}


def perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_adapted_layer_changes_the_frames(kind: str, models: Path) -> None:
    """Each update gets a gradient; merged into the weights, it gives the same frames; the batch changes nothing."""
    encoder, plain = fresh(models / kind), encode(fresh(models / kind), CLIPS[:2])
    add_lora(encoder, EncoderLora.model_validate(LORA))
    assert same(encode(encoder, CLIPS[:2]), plain)
    perturb(encoder)
    lora = {name: tensor for name, tensor in encoder.named_parameters() if ".lora_" in name}
    assert len({name.split(".layers.")[1].split(".")[0] for name in lora}) == 2
    gradient(list(lora.values()), [encode(encoder, CLIPS[:2])])
    assert [name for name, tensor in lora.items() if tensor.grad is None or not tensor.grad.abs().max()] == []
    with torch.no_grad():
        assert invariant(encoder, CLIPS[:3])
        adapted, merged = encode(encoder, CLIPS[:2]), fresh(models / kind)
        merged.model.load_state_dict(merged_tensors(encoder))
        assert same(encode(merged, CLIPS[:2]), adapted)
    assert not any(close(one, other, 1e-3) for one, other in zip(adapted, plain, strict=True))


def adapted(models: Path, kind: str = "whisper", trainable: str = NEW, **lora: Any) -> SpeechLLM:
    encoder = {"lora": {"rank": 2, "alpha_ratio": 2.0} | lora}
    model = build(models, kind, encoder=encoder, trainable=trainable)
    perturb(model)
    return model


def test_upper_layers_alone_are_adapted_and_counted(models: Path, examples: list[Example]) -> None:
    model = adapted(models, layers=1).train()
    assert model.frozen_layers == 1
    assert not model.encoder_is_frozen
    torch.cat(model.clips(examples[:2])).square().mean().backward()
    lora = [name for name, parameter in model.named_parameters() if part_of(name) == "encoder_lora"]
    assert len(lora) == 2 * 2
    assert all(".layers.1." in name for name in lora)
    trained = {name for name in trained_tensors(model) if name.startswith("encoder.")}
    assert (
        trained == set(lora) == {n for n, p in model.named_parameters() if n[:8] == "encoder." and p.grad is not None}
    )
    part = next(part for part in summarise_parts(model, {}) if part.name == "encoder_lora")
    assert part.trained == part.parameters == sum(model.get_parameter(name).numel() for name in lora)
    assert model.measure(examples[0], 9000).cost.frames > 0
    assert adapted(models).frozen_layers == 0


def test_two_trials_share_weights_that_lora_does_not_touch(models: Path, examples: list[Example]) -> None:
    plain = build(models, "whisper", trainable="adapter+lora+tokens").clips(examples[:2])
    adapted(models)
    again = build(models, "whisper", trainable="adapter+lora+tokens").clips(examples[:2])
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("trainable", [NEW, "adapter+lora+tokens"])
def test_export_and_warm_start_keep_lora(
    trainable: str, models: Path, corpus: Shards, tmp_path: Path, examples: list[Example]
) -> None:
    """Whether it trains on from there or stays frozen; then no cache of the published encoder is right."""
    model = adapted(models, layers=1)
    source = ExportSource("s", 1, "c", "f", {}, model.bases)
    peft_export.write(model, tmp_path, source)
    encoder = {"path": str(models / "whisper"), "lora": {"rank": 2, "alpha_ratio": 2.0, "layers": 1}}
    config = settings(models, "whisper", encoder=encoder, trainable=trainable, init_from=str(tmp_path))
    loaded = SpeechLLM(config, ANSWERS).eval()
    with torch.no_grad():
        assert all(map(close, loaded.clips(examples[:2]), model.clips(examples[:2]), [2e-3] * 2))
    assert loaded.has_own_encoder
    assert loaded.encoder_is_frozen == (trainable != NEW)
    other = config.model_copy(
        update={"encoder": config.encoder.model_copy(update={"lora": EncoderLora(rank=2, layers=1)})}
    )
    with pytest.raises(CheckpointMisfitError, match=r"encoder_lora with scale 2, and this model with scale 16"):
        SpeechLLM(other, ANSWERS)


@pytest.mark.parametrize(
    ("kind", "changed", "problem"),
    [
        (
            "whisper",
            {"lora": {"rank": 2, "layers": 3}},
            r"model.encoder.lora.layers: 3 upper layers .* has 2 up to the",
        ),
        (
            "whisper",
            {"layers": 1, "lora": {"rank": 2, "layers": 2}},
            r"model.encoder.lora.layers: 2 .* has 1 up to the",
        ),
        (
            "w2v-bert",
            {"lora": {"rank": 2}},
            r"model.encoder.lora.targets: q_proj, v_proj match no .* linear_q, linear_v",
        ),
        ("wavlm-layer", {"lora": {"rank": 2}}, r"model.encoder.lora.targets: q_proj, v_proj .* intermediate_dense"),
    ],
)
def test_lora_that_does_not_fit_is_refused(kind: str, changed: dict[str, Any], problem: str, models: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        SpeechLLM(settings(models, kind, encoder=changed), ANSWERS, "meta")


def test_settings_of_lora_are_checked_together(models: Path) -> None:
    lora = {"lora": {"rank": 2}}
    assert settings(models, trainable=NEW, encoder=lora | {"spec_augment": 0.1}).problems() == []
    [problem] = settings(models, trainable=NEW, encoder=lora | {"dtype": "bfloat16"}).problems()
    assert problem.startswith("model.encoder.dtype: bfloat16")
    with pytest.raises(ConfigError, match=r"encoder_lora is frozen and was never loaded.*model.encoder.lora.rank=0"):
        SpeechLLM(settings(models, trainable="adapter+lora+tokens", encoder=lora), ANSWERS, "meta")
