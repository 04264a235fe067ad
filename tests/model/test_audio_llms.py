"""Audio LLMs as a base: the numbers are those of the plain model, and nothing else of the product tells them apart.

`test_encoders.py`, `test_invariance.py` and `test_mutations.py` have rows of these models, too.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel

from data.corpus.audio import waveform
from data.errors import ConfigError, UnavailableError
from data.loading.examples import Example
from model.checkpoints import peft_export
from model.checkpoints.audio_llms import FAMILIES, UNSUPPORTED, check_audio_llm
from model.checkpoints.base_files import check_model
from model.checkpoints.fingerprint import identify
from model.config import ModelConfig
from model.evaluation.scoring import generate, label_scores
from model.parts import part_of
from model.speech_llm.language_model import load_llm
from model.speech_llm.prompt import CLIP, END
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, build, close, replies, settings
from tests.model.test_invariance import check_stages
from tests.tiny_models import AUDIO_LLMS

PLAIN = {"end_of_audio": "none", "cls": "none"}
SOURCE = peft_export.ExportSource("s", 3, "synthetic", "abc", {"client": ("change",)})


def own(folder: Path, **changed: Any) -> dict[str, Any]:
    """Return the settings of an audio LLM with its own encoder."""
    return {"encoder": {"path": None}, "llm": {"path": str(folder)}} | changed


@torch.no_grad()
def plain_logits(folder: Path, prompt: list[int], example: Example, model: PreTrainedModel | None = None) -> Tensor:
    """Return logits [T, V] of the plain model for a prompt, whose clip and tokens its processor prepares."""
    model = model or AutoModelForMultimodalLM.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    family = FAMILIES[model.config.model_type]
    assert example.pcm is not None
    inputs = processor(text=family.placeholder, audio=[waveform(example.pcm)], return_tensors="pt")
    placeholders = inputs["input_ids"][inputs["input_ids"] == model.config.audio_token_id].tolist()
    ids = [token for part in prompt for token in (placeholders if part == CLIP else [part])]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits_TV: Tensor = model(**inputs).logits[0]
    return logits_TV


def check_logits(folder: Path, examples: list[Example], tolerance: float = 1e-5, **changed: Any) -> None:
    model = build(folder.parent, **own(folder, **PLAIN | changed, lora={"enabled": False}))
    for example in examples:
        prompt = model.prompt_builder.prompt(example).ids
        with torch.no_grad():
            logits_TV = model.llm(inputs_embeds=model.prompts([example])[0][None]).logits[0]
        expected_TV = plain_logits(folder, prompt, example)
        assert logits_TV.shape == expected_TV.shape
        assert close(logits_TV, expected_TV, tolerance)


@pytest.mark.parametrize("kind", AUDIO_LLMS)
def test_logits_equal_those_of_the_plain_model(kind: str, models: Path, examples: list[Example]) -> None:
    """For clips within the window of Qwen2-Audio, and over many blocks of Granite Speech; an odd length, too."""
    clips = [replace(examples[1], pcm=examples[1].pcm[:5203]), examples[3]]  # type: ignore[index]
    clips += [examples[6]] if kind == "granite-speech" else []
    check_logits(models / kind, clips, trainable="encoder+adapter")
    check_logits(models / kind, clips, 2e-3, trainable="adapter")  # features of a frozen encoder are rounded


def add_lora(folder: Path, to: Path, **changed: Any) -> Path:
    """Copy Granite Speech with a LoRA adapter in its folder, as it is published."""
    shutil.copytree(folder, to)
    config = to / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"has_lora_adapter": True}))
    plain = AutoModelForMultimodalLM.from_pretrained(folder)
    torch.manual_seed(4)
    lora = {"r": 2, "lora_alpha": 8, "target_modules": r".*language_model.*(q_proj|v_proj)"} | changed
    adapted = get_peft_model(plain, LoraConfig(init_lora_weights=False, **lora))
    adapted.save_pretrained(to)
    return to


def test_published_adapter_belongs_to_the_model(models: Path, examples: list[Example], tmp_path: Path) -> None:
    folder = add_lora(models / "granite-speech", tmp_path / "granite")
    check_logits(folder, [examples[2]], trainable="encoder+adapter")
    without = plain_logits(models / "granite-speech", [1, CLIP], examples[2])
    assert not close(plain_logits(folder, [1, CLIP], examples[2]), without, 1e-3)
    identity = identify("model.llm.path", str(folder), "audio-llm")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    changed = identify("model.llm.path", str(folder), "audio-llm")
    assert identity is not None
    assert changed is not None
    assert identity.digest != changed.digest
    weights.unlink()
    with pytest.raises(UnavailableError, match=r"lacks adapter_model\.safetensors"):
        check_model("model.llm.path", str(folder), "audio-llm")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "the adapter in its folder uses DoRA; merge it"),
        ({"target_modules": ["input_linear"]}, "adapts model.encoder.input_linear.weight, which is no layer"),
    ],
)
def test_other_published_adapters_are_refused(
    changed: dict[str, Any], message: str, models: Path, tmp_path: Path
) -> None:
    folder = add_lora(models / "granite-speech", tmp_path / "granite", **changed)
    with pytest.raises(ConfigError, match=message):
        load_llm.__wrapped__(str(folder), "float32", "cpu")


def test_adapter_beside_another_audio_llm_is_refused(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "qwen2-audio", tmp_path / "qwen")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnavailableError, match=r"holds a PEFT adapter .* beside the model"):
        check_model("model.llm.path", str(folder), "audio-llm")


@pytest.mark.parametrize("kind", AUDIO_LLMS)
@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], pytest.param(["lm_head", "up_proj"], marks=pytest.mark.long)],
    ids=["q, v", "head"],
)
def test_exported_lora_is_for_the_whole_model(
    kind: str, targets: list[str], models: Path, examples: list[Example], tmp_path: Path
) -> None:
    """PEFT loads it on the plain audio LLM, leaves the encoder alone, and computes the trial's logits."""
    lora = {"rank": 2, "dropout": 0.0, "targets": targets}
    model = build(models, kind, **PLAIN, trainable="encoder+lora+adapter", lora=lora)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)  # so that nothing else is exported
    peft_export.write(model, tmp_path, SOURCE)
    example, prompt = examples[3], model.prompt_builder.prompt(examples[3]).ids
    with torch.no_grad():
        expected_TV = model.llm(inputs_embeds=model.prompts([example])[0][None]).logits[0]
    plain = AutoModelForMultimodalLM.from_pretrained(models / kind)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    layers = {name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert all("language_model" in name or "lm_head" in name for name in layers)
    assert close(plain_logits(models / kind, prompt, example, adapted.get_base_model()), expected_TV)
    again = build(models, kind, **PLAIN, trainable="lora", lora=lora, init_from=str(tmp_path))
    with torch.no_grad():
        assert close(label_scores(again, [example]), label_scores(model, [example]), 2e-3)  # the encoder is frozen here
    started = build(models, kind, **PLAIN, trainable="lora", lora=lora | {"init_from": str(tmp_path / "lora")})
    assert all(
        torch.equal(tensor, dict(started.named_parameters())[name])
        for name, tensor in model.named_parameters()
        if "lora_A" in name
    )


@pytest.mark.parametrize("kind", AUDIO_LLMS)
def test_model_that_starts_from_an_export_is_the_same(
    kind: str, models: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = build(models, kind, trainable="encoder.*.layers.1.*+new")
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(0.01)
    peft_export.write(model, tmp_path, SOURCE)
    assert not any("layers.0" in name for name in peft_export.exported_tensors(model) if "encoder" in name)
    again = build(models, kind, trainable="lora", init_from=str(tmp_path))
    assert again.loaded >= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        model.frozen_layers = 0
        expected = [model._encode(examples[:3]), again._encode(examples[:3])]
        assert all(map(close, *expected))
    assert generate(again, replies(examples[:1]))


@pytest.mark.parametrize("kind", AUDIO_LLMS)
def test_clip_stands_between_the_tokens_of_the_family(kind: str, models: Path, examples: list[Example]) -> None:
    model = build(models, kind)
    assert (model.encoder_is_frozen, "adapter" in model.trained_parts) == (False, True)
    ids, hf = model.prompt_builder.prompt(examples[0]).ids, model.prompt_builder.tokenizer.hf
    begin = ["<|audio_bos|>"] if kind == "qwen2-audio" else []
    end = ["<|audio_eos|>"] if kind == "qwen2-audio" else []
    place = ids.index(CLIP)
    assert hf.convert_ids_to_tokens(ids[place - len(begin) : place]) == begin
    assert hf.convert_ids_to_tokens(ids[place + 1 : place + 1 + len(end)]) == end
    assert ids[place + 1 + len(end)] == END
    text = build(models, kind, **PLAIN, modality="text")
    assert not {*hf.convert_tokens_to_ids(begin + end)} & {*text.prompt_builder.prompt(examples[0]).ids}


def test_encoder_of_an_audio_llm_serves_another_llm(models: Path, examples: list[Example]) -> None:
    encoder = {"path": str(models / "qwen2-audio")}
    model = build(models, "qwen2-audio", encoder=encoder, llm={"path": str(models / "llm")})
    with torch.no_grad():
        alone = torch.cat([label_scores(model, [example]) for example in examples[:3]])
        assert close(label_scores(model, examples[:3]), alone)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("qwen2-audio", ["q_proj", "fc1"]), pytest.param("granite-speech", ["to_q", "to_out"], marks=pytest.mark.long)],
)
def test_lora_adapts_the_encoder_of_an_audio_llm(
    kind: str, targets: list[str], models: Path, examples: list[Example]
) -> None:
    lora = {"rank": 2, "targets": targets, "layers": 1}
    model = build(models, kind, encoder={"path": None, "lora": lora}, trainable="new")
    assert (model.frozen_layers, model.encoder_is_frozen) == (1, False)
    adapted = {name for name, parameter in model.named_parameters() if part_of(name) == "encoder_lora"}
    assert all(".layers.1." in name for name in adapted)
    check_stages(["clips", "scores"], model, examples)
    plain = build(models, kind, trainable="new")
    assert not close(model.clips(examples[:1])[0], plain.clips(examples[:1])[0], 1e-4)


REFUSED = [
    (
        {"encoder": {"path": None}, "llm": {"path": "llm"}},
        r"encoder.path: null is for an audio LLM .* llama model",
    ),
    (
        {"encoder": {"path": "whisper"}, "llm": {"path": "qwen2-audio"}},
        r"encoder.path: .*qwen2_audio.* own encoder",
    ),
    ({"encoder": {"path": None}, "llm": {"path": "voxtral"}}, r"llm.path: .* of the family voxtral, which is not"),
    ({"encoder": {"path": "whisper"}, "llm": {"path": "voxtral"}}, r"llm.path: .* of the family voxtral, which is not"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_llm_and_encoder_that_do_not_fit_are_refused(
    changed: dict[str, dict[str, Any]], message: str, models: Path, tmp_path: Path
) -> None:
    voxtral = shutil.copytree(models / "llm", tmp_path / "voxtral")
    (voxtral / "config.json").write_text('{"model_type": "voxtral"}')
    paths = {name: str(voxtral if name == "voxtral" else models / name) for name in ("llm", "whisper", "qwen2-audio")}
    parts = {part: {"path": paths.get(given["path"])} for part, given in changed.items()} | {"voxtral": {}}
    parts["llm"] = {"path": str(voxtral)} if changed["llm"]["path"] == "voxtral" else parts["llm"]
    del parts["voxtral"]
    with pytest.raises(ConfigError, match=message) as error:
        SpeechLLM(settings(models, **parts), ANSWERS, "meta")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", sorted(UNSUPPORTED))
def test_every_other_family_is_refused_by_name(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    config = ModelConfig.model_validate(own(tmp_path))
    with pytest.raises(ConfigError, match=f"audio LLM of the family {family}, which is not supported; use one of"):
        check_audio_llm(config)


def test_settings_of_encoder_and_adapter_are_refused() -> None:
    changed = {"path": None, "context": "clip"}
    config = ModelConfig.model_validate({"encoder": changed, "adapter": {"window": 9, "kind": "stack"}})
    names = [problem.partition(":")[0] for problem in config.problems()]
    assert names == ["model.adapter.kind", "model.adapter.window", "model.encoder.context"]
    assert all("has no effect on an audio LLM (model.encoder.path=null)" in problem for problem in config.problems())


def test_incomplete_audio_llm_is_refused(models: Path, tmp_path: Path) -> None:
    """Files of torch are read as well."""
    folder = shutil.copytree(models / "qwen2-audio", tmp_path / "qwen")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    changed = own(folder, trainable="lora", **PLAIN)
    build(tmp_path, **changed)
    for name, message in (
        ("audio_tower.layers.0.fc1.weight", r"lacks 1 of the encoder's tensors"),
        ("multi_modal_projector.linear.bias", r"lacks 1 of the projector's tensors"),
        ("language_model.lm_head.weight", r"lacks 1 of the LLM's tensors"),
    ):
        less = {other: tensor for other, tensor in tensors.items() if other != name}
        torch.save(less, folder / "pytorch_model.bin")
        with pytest.raises(UnavailableError, match=message):
            build(tmp_path, **changed)
