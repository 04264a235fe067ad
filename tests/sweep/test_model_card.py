"""The sentences of a model card follow the configuration of the trial."""

from pathlib import Path
from typing import Any

import pytest

from data.loading.tasks import AnswerSet
from model.checkpoints import peft_export
from model.evaluation.bootstrap import Interval
from model.evaluation.ceiling import Ceiling
from model.evaluation.metrics import Record
from model.speech_llm import quantization
from model.speech_llm.speech_llm import SpeechLLM
from sweep.config.schema import Config, parse
from sweep.export.model_card import CardFacts, model_card
from tests.conftest import LABELS
from tests.model.test_audio_llms import add_lora

RECORD = Record("c/1", "classify", "c", "client", None, "change", "change", (0.0, -1.0, -2.0), 0.5, 2, True)
TEXT, TASKS = {"modality": "text"}, ("classify", "forecast", "response", "quality")
CASES: list[tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
    (
        {},
        (
            "A speech LLM for counselling dialogues. It predicts the code of a turn. It reads the turn as audio, and "
            "up to 10 turns before it as text.",
            "whisper`, frozen |",
            "llm`, frozen, with LoRA of rank 8 on all linear layers |",
            "as a first coding that a trained coder checks",
            "predict . --csv sessions.csv --audio recordings",
            "from the corpus and the base models that `config.yaml` names",
        ),
        ("control", "earlier", "draft", "rating", "next turn"),
    ),
    ({"data": {"history": 0}}, ("It reads the turn as audio, and no turn before it.",), ("turns before it",)),
    ({"data": {"history": 1}}, ("and up to 1 turn before it as text.",), ()),
    ({"model": {"prompt": {"history_tokens": 0}}}, ("and no turn before it.",), ("tokens",)),
    ({"model": {"prompt": {"history_tokens": 9}}}, ("before it as text, as far as they fit into 9 tokens.",), ()),
    (
        {"model": TEXT},
        ("A text LLM, which reads no audio, for", "It reads the turn as text, and up to 10"),
        ("speech", "--audio", "as audio"),
    ),
    ({"model": {"modality": "text+speech"}}, ("It reads the turn as text and as audio, and",), ()),
    (
        {"tasks": {"classify": 0, "forecast": 1}, "data": {"history": 2}, "model": TEXT},
        (
            "It predicts the code of the next turn.",
            "Of what comes next it reads nothing, only up to 3 turns before it, as text.",
        ),
        ("reads the turn", "code of a turn"),
    ),
    (
        {"tasks": {"classify": 1, "forecast": 1, "quality": 1}, "data": {"history": 0}},
        (
            "It predicts the code of a turn, the code of the next turn and the quality of a session.",
            "only up to 1 turn before it, or back to the last one that has audio: that one as audio, the others as",
            "Of a session it reads up to 1 turn at the end, or back",
            "as a first coding that a trained coder checks on a sample before anything is concluded from it and as a "
            "first rating of sessions",
        ),
        (),
    ),
    (
        {"tasks": {"classify": 0, "response": 1}},
        ("It predicts the therapist's next turn.", "none of which reaches a client unread", "To write replies for new"),
        ("coding", "To code"),
    ),
    ({"model": {"lora": {"enabled": False}}}, ("llm`, frozen |",), ("LoRA", "PeftModel")),
    (
        {"model": {"trainable": "new+llm"}},
        ("llm`, trained, with LoRA", "in Python, without the weights of the LLM itself that differ from it"),
        (),
    ),
    ({"model": {"trainable": "encoder+new"}}, ("whisper`, trained |",), ("whisper`, frozen",)),
    ({"data": {"sound": "zeroed"}}, ("It is a control experiment: all clips were silenced.",), ()),
    ({"data": {"sound": "zeroed"}, "model": TEXT}, (), ("control",)),
    (
        {"data": {"sound": "noisy", "snr_db": 5, "last_text": "omitted"}, "model": {"modality": "text+speech"}},
        ("noise was added to all clips at 5 dB and the text of the audio turn was left out.",),
        (),
    ),
]


def trial(models: Path, changed: dict[str, Any]) -> Config:
    model = {"encoder": {"path": str(models / "whisper")}, "llm": {"path": str(models / "llm")}}
    return parse({"name": "t", **changed, "model": model | changed.get("model", {})}, "t")


def card(models: Path, changed: dict[str, Any], **facts: Any) -> str:
    """Return the card of a trial whose predictions are given, from a model without weights."""
    config = trial(models, changed)
    labels = AnswerSet(LABELS, (5, 3, 2))
    answers = {task: AnswerSet() if task == "response" else labels for task in config.tasks.active()}
    known: dict[str, Any] = {
        "sweep": "t",
        "trial": 3,
        "corpus": "synthetic",
        "fingerprint": "ab",
        "roles": {"client": LABELS},
        "code": "1",
        "epoch": 2,
        "metrics": {"accuracy": 1.0},
        "predictions": {"classify": (LABELS, [RECORD])},
        "confirmed": [],
        "bases": {},
        "bases_are_recorded": True,
    }
    return model_card(SpeechLLM(config.model, answers, "meta"), config, CardFacts(**known | facts))


@pytest.mark.parametrize(("changed", "present", "absent"), CASES, ids=lambda case: str(case) * isinstance(case, dict))
def test_sentences_follow_the_configuration(
    changed: dict[str, Any], present: tuple[str, ...], absent: tuple[str, ...], models: Path
) -> None:
    text = card(models, changed)
    assert [words for words in present if words not in text] == []
    assert [words for words in absent if words in text.replace(str(models), "")] == []


def test_card_has_the_human_ceiling_where_there_is_one(models: Path) -> None:
    figures = {"accuracy": Interval(0.8, 0.7, 0.9), "Krippendorff's alpha": Interval(0.5, 0.4, 0.6)}
    human = Ceiling(task="classify", split="val", turns=("c/1",), sessions=1, annotators=(2, 3), figures=figures)
    text = card(models, {}, ceilings=[human])
    first, second = human.lines([RECORD])
    assert f"Beside annotators:\n\n- {first}\n- {second}" in text
    assert "accuracy 1.000" in second
    assert "annotators" not in card(models, {})


def test_card_of_a_base_with_an_adapter_of_its_own_names_no_peft(models: Path, tmp_path: Path) -> None:
    folder = add_lora(models / "granite-speech", tmp_path / "granite")
    text = card(models, {"model": {"encoder": {"path": None}, "llm": {"path": str(folder)}}})
    assert "PeftModel" not in text
    assert "`sweep export --merged` writes both in one model." in text


@pytest.mark.parametrize(
    ("load_in", "stored", "settings"),
    [
        ("8bit", "quantized to 8 bits (bitsandbytes, one scale for each row)", "load_in_8bit=True"),
        (
            "4bit",
            "quantized to 4 bits (bitsandbytes, NF4 with double quantization)",
            'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
        ),
    ],
)
def test_card_says_how_the_base_was_stored(
    load_in: str, stored: str, settings: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: True)
    text = card(models, {"model": {"llm": {"path": str(models / "llm"), "load_in": load_in}}})
    assert f"llm`, frozen, {stored}, with LoRA of rank 8" in text
    assert f"stored = BitsAndBytesConfig({settings})\nbase = " in text
    assert "', quantization_config=stored)" in text
    assert "quantized" not in card(models, {})


def test_figures_say_where_they_come_from(models: Path) -> None:
    assert "which also chose among the trials and therefore flatters it" in card(models, {})
    alone = card(models, {}, trial=None)
    assert "which flatters it if its settings were chosen there" in alone
    assert "chose among the trials" not in alone
    none = card(models, {}, predictions={}, metrics={}, epoch=0)
    assert none.count("It was not evaluated") == 2
    assert "validation split" not in none
    assert "metric" not in none


def test_card_names_what_a_trial_started_from(models: Path, tmp_path: Path) -> None:
    earlier = SpeechLLM(trial(models, {}).model, {"classify": AnswerSet(LABELS, (5, 3, 2))})
    source = peft_export.ExportSource("s", 1, "synthetic", "ab", {"client": LABELS})
    peft_export.write(earlier, tmp_path, source)
    text = card(models, {"model": {"init_from": str(tmp_path)}})
    assert f"| started from | `{tmp_path}` |" in text
    assert "the corpus, the base models and the weights of `model.init_from` that `config.yaml` names" in text
