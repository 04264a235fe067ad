"""`export --merged`: the lines of the model card load the folder with plain transformers, and score as the model does.

The lines are run as they are; docs/export.md has those of a speech LLM with Whisper and the default adapter.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from data.loading.examples import Example
from model.evaluation.scoring import decide, generate, label_scores
from model.speech_llm.speech_llm import SpeechLLM
from model.speech_llm.tokenizer import load_tokenizer
from sweep.export.merged import write_merged
from sweep.export.merged_lines import TURNS, merged_lines
from tests.model.common import build, close
from tests.model.test_audio_llms import add_lora
from tests.sweep.common import sweep
from tests.tiny_models import AUDIO_LLMS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "export.md"
PLAIN = {"modality": "speech", "trainable": "new", "cls": "none", "end_of_audio": "none"}
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}<s>"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "whisper": ("whisper", PLAIN),
    "learned vectors": ("hubert-group", {"cls": "after", "trainable": "new"}),
    "encoder trained, MLP": ("hubert-layer", {"adapter": {"kind": "stack", "window": 4, "stride": 3, "hidden": 16}}),
    "upper layers trained": ("whisper", {"trainable": "encoder.*.layers.1.*+new", "priors": "balanced"}),
    "clip context": ("whisper-clip", {"adapter": {"kind": "conv", "window": 5, "stride": 3}, "trainable": "new"}),
    "LoRA of the encoder": ("whisper", {"trainable": "new", "encoder": {"lora": {"rank": 2, "layers": 1}}}),
    "conformer": ("conformer-relative", PLAIN),
    "w2v-BERT": ("w2v-bert", {"trainable": "new", "prompt": {"order": "sound-text", "instruction": "task"}}),
    "layers": ("hubert-layer", {**PLAIN, "encoder": {"layers": [0, 2]}, "adapter": {"kind": "merge"}}),
    "a layer": ("wavlm-group", {**PLAIN, "encoder": {"layers": 1}, "adapter": {"kind": "queries", "queries": 3}}),
    "weighted": (
        "whisper-clip",
        {**PLAIN, "encoder": {"layers": "weighted"}, "adapter": {"kind": "queries", "rate": 9}},
    ),
    "weighted, pooled": ("w2v-bert", {**PLAIN, "encoder": {"layers": "weighted"}}),
    "weighted, upper layers": ("whisper", {"encoder": {"layers": "weighted"}, "trainable": "encoder.*.layers.1.*+new"}),
    "Qwen2-Audio": ("qwen2-audio", {"trainable": "new", "cls": "before"}),
    "Qwen2-Audio, upper layers": ("qwen2-audio", {**PLAIN, "trainable": "encoder.*.layers.1.*+new"}),
    "Qwen2-Audio, encoder LoRA": ("qwen2-audio", {**PLAIN, "encoder": {"path": None, "lora": {"rank": 2}}}),
    "Granite Speech": ("granite-speech", PLAIN),
    "Granite Speech, upper layers": ("granite-speech", {**PLAIN, "trainable": "encoder.*.layers.1.*+new"}),
    "Granite Speech, encoder": ("granite-speech", {**PLAIN, "trainable": "encoder+new"}),
    "Granite Speech, LM head": (
        "granite-speech",
        {**PLAIN, "lora": {"rank": 2, "dropout": 0.0, "targets": ["lm_head"]}},
    ),
    "text": ("whisper", {**PLAIN, "modality": "text", "lora": {"rank": 2, "dora": True, "dropout": 0.0}}),
    "no LoRA": ("whisper", {"modality": "text", "lora": {"enabled": False}, "end_of_audio": "none"}),
    "LM head": ("whisper", {**PLAIN, "lora": {"rank": 2, "dropout": 0.0, "targets": ["lm_head", "q_proj"]}}),
}

USUAL = (
    "learned vectors",
    "upper layers trained",
    "clip context",
    "text",
    "LM head",
    "layers",
    "weighted",
    "Granite Speech",
)
LONG = pytest.mark.long


def case_model(models: Path, kind: str, changed: dict[str, Any]) -> SpeechLLM:
    if kind in AUDIO_LLMS:
        return build(models, **{"encoder": {"path": None}, "llm": {"path": str(models / kind)}} | changed)
    encoder = {"path": str(models / kind.removesuffix("-clip"))} | changed.get("encoder", {})
    encoder |= {"context": "clip"} if kind == "whisper-clip" else {}
    return build(models, **changed | {"encoder": encoder})


def example(seconds: float = 0.83) -> Example:
    pcm = (np.random.default_rng(8).standard_normal(round(seconds * 16_000)) * 3000).astype("<i2")
    return Example("e", "classify", "c", TURNS[-1][0], "change", None, TURNS, len(TURNS) - 1, pcm)


def run(lines: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run lines of Python in a folder that also has the clip."""
    soundfile.write(folder / "clip.wav", example().pcm, 16_000)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names


def check_scores(model: SpeechLLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decide(model, "classify", label_scores(model, [example()]))[0].tolist()
    lines = merged_lines(model)
    write_merged(model, folder)
    scores = run(lines, folder, monkeypatch)["scores"]
    found = [float(scores[label]) for label in model.tasks["classify"].labels]
    assert found == pytest.approx(expected, rel=1e-4)
    assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize("case", [case if case in USUAL else pytest.param(case, marks=LONG) for case in CASES])
def test_lines_score_as_the_model_does(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_scores(case_model(models, *CASES[case]), tmp_path, monkeypatch)


def test_base_models_are_not_written_to(models: Path, tmp_path: Path) -> None:
    first = case_model(models, *CASES["LM head"])
    expected = label_scores(first, [example()])
    write_merged(case_model(models, *CASES["LM head"]), tmp_path)
    assert torch.equal(label_scores(first, [example()]), expected)


def test_published_adapter_is_merged_as_well(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_lora(models / "granite-speech", tmp_path / "granite")
    llm = {"llm": {"path": str(folder)}}
    (tmp_path / "m").mkdir()
    check_scores(case_model(models, "granite-speech", PLAIN | llm), tmp_path / "m", monkeypatch)
    assert not (tmp_path / "m/adapter_config.json").exists()


def test_added_tokens_are_kept(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after fine-tuning with tokens of one's own: the embeddings are those of the longer vocabulary."""
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(models / "llm")
    tokenizer = load_tokenizer(str(models / "llm")).hf
    tokenizer = type(tokenizer).from_pretrained(models / "llm")
    tokenizer.add_tokens([" so so"])
    llm.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        nn.init.normal_(llm.get_input_embeddings().weight[-1], std=0.5)
    for part in (llm, tokenizer):
        part.save_pretrained(tmp_path / "llm")
    (tmp_path / "m").mkdir()
    changed = {**PLAIN, "modality": "text+speech", "llm": {"path": str(tmp_path / "llm")}}
    check_scores(case_model(models, "whisper", changed), tmp_path / "m", monkeypatch)


def test_chat_prompt_and_reply(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case_model(models, "whisper", {**PLAIN, "prompt": {"format": "plain"}})
    model.prompt_builder.tokenizer.hf.chat_template = CHAT
    try:
        chat = case_model(models, "whisper", {**PLAIN, "prompt": {"format": "chat"}})
        (tmp_path / "chat").mkdir()
        check_scores(chat, tmp_path / "chat", monkeypatch)
    finally:
        model.prompt_builder.tokenizer.hf.chat_template = None
    model.tasks = {"response": model.tasks["response"]}
    asked = replace(example(), task="response", answer="", turns=TURNS[:1], audio_turn=0)
    [reply] = generate(model, [asked])
    lines = merged_lines(model)
    write_merged(model, tmp_path)
    names = run(lines, tmp_path, monkeypatch)
    assert names["tokenizer"].decode(names["reply"][0], skip_special_tokens=True).strip() == reply.text


def test_documented_lines_score_an_exported_trial(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/export.md are those that the card of such a trial has, and its folder has all they need."""
    whisper = (here / "good.yaml").read_text().replace("hubert-group", "whisper")
    (here / "good.yaml").write_text(whisper)
    assert sweep("train", "good.yaml", "--set=train.epochs=1", "--out", "trial").code == 0
    assert sweep("export", "trial", "--merged", "--out", "coder").code == 0
    documented = re.search(r"```python\n(import soundfile\n.*?)```", DOCS.read_text(), re.DOTALL)
    card = re.search(r"```python\n(.*?)```", Path("coder/README.md").read_text(), re.DOTALL)
    assert documented is not None
    assert card is not None
    assert documented[1].replace('"coder"', '"."') == card[1]
    assert "LoRA is merged into the weights of the LLM." in Path("coder/README.md").read_text()
    assert close(*trial_scores(documented[1].splitlines(), here, monkeypatch), tolerance=1e-4)


def trial_scores(lines: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of the documented lines, and those of the trial's model."""
    from sweep.analysis.evaluate import find_checkpoint, load_trained
    from sweep.config.files import load
    from sweep.config.resolve import resolve

    trained = load_trained(find_checkpoint(Path("trial")), resolve(load("trial/config.yaml")), ())
    expected = label_scores(trained.model.eval(), [example()])[0]
    scores = run(lines, here, monkeypatch)["scores"]
    return torch.stack([scores[label] for label in trained.model.tasks["classify"].labels]), expected
