"""Prompts: the layout of the sequence, what is dropped when it does not fit, and what cannot be written at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.errors import ConfigError, DataError
from data.loading.examples import Example
from data.loading.tasks import TASKS
from model.speech_llm.label_trie import shared_prefixes
from model.speech_llm.prompt import CLIP, CLS, END, IGNORE, PromptBuilder, answer_text
from model.speech_llm.speech_llm import SpeechLLM
from model.speech_llm.tokenizer import load_tokenizer
from tests.model.common import ANSWERS, settings

BARE = {"modality": "text", "cls": "none", "end_of_audio": "none"}
CHAT = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
LLAMA_DATE = (
    '{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif -%}{{ date_string }}'
)


def prompter(models: Path, folder: Path | None = None, **changed: Any) -> PromptBuilder:
    path = folder or models / "llm"
    changed["llm"] = {"path": str(path)} | changed.get("llm", {})
    return PromptBuilder(load_tokenizer(str(path)), settings(models, **changed))


def shown(prompter: PromptBuilder, ids: list[int]) -> str:
    names = {CLIP: "[CLIP]", END: "[END]", CLS: "[CLS]"}
    tokenizer = prompter.tokenizer.hf
    return "".join(names[token] if token < 0 else tokenizer.decode([token]) for token in ids)


def prompt_text(own: PromptBuilder, example: Example) -> str:
    """The prompt without the token that it begins with."""
    text = shown(own, own.prompt(example).ids)
    start = own.tokenizer.hf.bos_token
    assert text.startswith(start)
    return text.removeprefix(start)


def with_template(models: Path, folder: Path, template: str) -> Path:
    """A tokenizer that has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def example(examples: list[Example]) -> Example:
    turns = (("therapist", "i want it"), ("client", "so"), ("client", "really now"))
    return replace(examples[2], turns=turns, heard=2)


@pytest.fixture
def reply(example: Example) -> Example:
    """An example whose last clip lies in the middle of the dialogue."""
    turns = (("therapist", "how are you"), ("client", "well so"), ("therapist", "go on"), ("client", "maybe"))
    return replace(example, task="response", speaker="therapist", answer="tell me more", turns=turns, heard=1)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"modality": "text", "cls": "none"}, "client: really now\nlabel:"),
        ({"modality": "text", "cls": "before"}, "client: really now\nlabel:[CLS]"),
        ({"modality": "text", "cls": "after"}, "client: really now\nlabel:"),
        ({"modality": "speech", "cls": "none"}, "client:[CLIP][END]\nlabel:"),
        ({"modality": "speech", "end_of_audio": "none"}, "client:[CLIP]\nlabel:[CLS]"),
        ({"modality": "text+speech", "end_of_audio": "none"}, "client: really now[CLIP]\nlabel:[CLS]"),
        ({"modality": "text+speech", "cls": "none"}, "client: really now[CLIP][END]\nlabel:"),
        ({"cls": "none", "prompt": {"order": "sound-text"}}, "client:[CLIP][END] really now\nlabel:"),
        ({"modality": "speech", "cls": "none", "prompt": {"order": "sound-text"}}, "client:[CLIP][END]\nlabel:"),
    ],
)
def test_the_layout_of_every_modality(models: Path, example: Example, changed: dict[str, Any], expected: str) -> None:
    own = prompter(models, **changed)
    assert prompt_text(own, example) == f"therapist: i want it\nclient: so\n{expected}"
    assert own.prompt(example).dropped_turns == 0


def test_every_turn_ends_with_the_separator(models: Path, example: Example) -> None:
    own = prompter(models, prompt={"separator": " [SEP] "})
    expected = "therapist: i want it [SEP] client: so [SEP] client: really now[CLIP][END] [SEP] label:[CLS]"
    assert prompt_text(own, example) == expected


def test_roles_are_renamed_everywhere(models: Path, example: Example) -> None:
    own = prompter(models, **BARE, prompt={"roles": {"client": "Patient"}})
    assert prompt_text(own, example) == "therapist: i want it\nPatient: so\nPatient: really now\nlabel:"
    forecast = replace(example, task="forecast")
    assert prompt_text(own, forecast).endswith("\nnext Patient label:")
    assert prompt_text(own, replace(forecast, speaker="therapist")).endswith("\nnext therapist label:")


@pytest.mark.parametrize("task", TASKS)
def test_the_cue_of_each_task_ends_the_prompt(task: str, models: Path, example: Example) -> None:
    expected = {
        "classify": "label:",
        "client_talk": "talk type:",
        "therapist_behaviour": "behaviour:",
        "forecast": "next client label:",
        "response": "client:",
        "quality": "session quality:",
    }
    assert prompt_text(prompter(models, **BARE), replace(example, task=task)).endswith(f"now\n{expected[task]}")


@pytest.mark.parametrize("task", TASKS)
def test_the_instruction_stands_first(task: str, models: Path, example: Example) -> None:
    asked = replace(example, task=task)
    dialogue = prompt_text(prompter(models, **BARE), asked)
    told = prompter(models, **BARE, prompt={"instruction": "task"})
    assert prompt_text(told, asked) == f"{TASKS[task].instruction}\n{dialogue}"
    own = prompter(models, **BARE, prompt={"instruction": "say what it is"})
    assert prompt_text(own, asked) == f"say what it is\n{dialogue}"


def test_whole_turns_are_dropped_from_the_oldest_on(models: Path, example: Example) -> None:
    """And what stays keeps its tokens."""
    full = prompter(models, **BARE).prompt(example).ids
    limited = prompter(models, **BARE, llm={"max_text_tokens": len(full) - 1})
    prompt = limited.prompt(example)
    assert prompt.dropped_turns == 1
    assert prompt_text(limited, example) == "client: so\nclient: really now\nlabel:"
    assert full[-len(prompt.ids) + 1 :] == prompt.ids[1:]
    assert prompter(models, **BARE, llm={"max_text_tokens": len(full)}).prompt(example).ids == full


@pytest.mark.parametrize(
    ("extra", "kept"), [(-1, "client: so\n"), (0, "therapist: i want it\nclient: so\n"), (None, "")]
)
def test_history_tokens_limits_the_turns_before_the_last(
    extra: int | None, kept: str, models: Path, example: Example
) -> None:
    history = len(prompter(models).tokenizer.ids("therapist: i want it\n"))
    history += len(prompter(models).tokenizer.ids("client: so\n"))
    limit = 0 if extra is None else history + extra
    own = prompter(models, **BARE, prompt={"history_tokens": limit})
    assert prompt_text(own, example) == f"{kept}client: really now\nlabel:"
    assert own.prompt(example).dropped_turns == 2 - kept.count("\n")


def test_both_limits_hold(models: Path, example: Example) -> None:
    full = len(prompter(models, **BARE).prompt(example).ids)
    for history, text, dropped in ((full, full, 0), (full, full - 1, 1), (0, full, 2)):
        own = prompter(models, **BARE, prompt={"history_tokens": history}, llm={"max_text_tokens": text})
        assert own.prompt(example).dropped_turns == dropped


def test_a_turn_that_is_heard_is_never_dropped(models: Path, reply: Example) -> None:
    rest = "client: well so[CLIP][END]\ntherapist: go on\nclient: maybe\ntherapist:[CLS]"
    own = prompter(models, prompt={"history_tokens": 0})
    assert prompt_text(own, reply) == rest
    prompt = own.prompt(reply)
    assert prompt.dropped_turns == 1
    words = sum(token >= 0 for token in prompt.ids)  # placeholders are not text
    assert prompter(models, llm={"max_text_tokens": words}).prompt(reply) == prompt
    with pytest.raises(DataError, match=f"{words} text tokens exceed"):
        prompter(models, llm={"max_text_tokens": words - 1}).prompt(reply)


def test_without_sound_all_turns_but_the_last_are_history(models: Path, reply: Example) -> None:
    own = prompter(models, **BARE, prompt={"history_tokens": 0})
    assert prompt_text(own, reply) == "client: maybe\ntherapist:"
    assert own.prompt(reply).dropped_turns == 3


def test_an_omitted_text_leaves_the_sound(models: Path, example: Example) -> None:
    silent = replace(example, turns=(*example.turns[:-1], ("client", "")))
    assert prompt_text(prompter(models), silent).endswith("client: so\nclient:[CLIP][END]\nlabel:[CLS]")
    assert prompt_text(prompter(models, **BARE), silent).endswith("client: so\nclient:\nlabel:")


def test_the_answer_ends_with_eos_and_cls_may_stand_before_it(models: Path) -> None:
    eos = load_tokenizer(str(models / "llm")).hf.eos_token_id
    plain, after = (prompter(models, cls=cls).answer("change") for cls in ("none", "after"))
    assert plain.targets == (*plain.inputs, eos)
    assert after.inputs == (*plain.inputs, CLS)
    assert after.targets == (*plain.inputs, IGNORE, eos)
    assert plain.predicted == after.predicted == len(plain.inputs) + 1


def test_answers_are_written_as_words(models: Path) -> None:
    assert answer_text("classify", "follow_neutral") == "follow neutral"
    assert answer_text("classify", "change|giving_info") == "change, giving info"
    assert answer_text("response", " well+then \n go_on ") == "well+then go_on"
    own = prompter(models)
    answers = own.label_answers("classify", ("change", "sustain", "change|sustain"))
    texts = [shown(own, list(answer.inputs)) for answer in answers.values()]
    assert texts == [" change", " sustain", " change, sustain"]


def test_labels_that_begin_alike_are_found(models: Path) -> None:
    answers = prompter(models, cls="after").label_answers("classify", ("change", "sustain", "change|sustain"))
    assert shared_prefixes(answers) == [("change", "change|sustain")]
    assert shared_prefixes({label: answers[label] for label in ("change", "sustain")}) == []


@pytest.mark.parametrize("special", ["</s>", "<s>", "<pad>"])
def test_a_special_token_that_a_transcript_spells_out_is_plain_text(
    special: str, models: Path, tmp_path: Path, example: Example
) -> None:
    said = replace(example, turns=(("therapist", f"i {special} it"), ("client", f"{special} so {special}")), heard=1)
    own = prompter(models, **BARE)
    tokenizer = own.tokenizer.hf
    assert tokenizer(special, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(special)]
    ids = own.prompt(said).ids
    assert not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert prompt_text(own, said) == f"therapist: i {special} it\nclient: {special} so {special}\nlabel:"
    answer = own.answer(special)
    assert not set(answer.inputs) & set(tokenizer.all_special_ids)
    chat = prompter(models, with_template(models, tmp_path, CHAT), **BARE, prompt={"format": "chat"})
    specials = [token for token in chat.prompt(said).ids if token in tokenizer.all_special_ids]
    assert specials == tokenizer("<s></s><s>", add_special_tokens=False)["input_ids"]


def test_the_chat_format_is_the_tokenizers_own(models: Path, tmp_path: Path, example: Example) -> None:
    """Its special tokens are themselves, and no other start stands before it."""
    llm = with_template(models, tmp_path, CHAT)
    own = prompter(models, llm, prompt={"format": "chat", "instruction": "task"})
    dialogue = "therapist: i want it\nclient: so\nclient: really now[CLIP][END]\nlabel:"
    expected = f"<s>system: {TASKS['classify'].instruction}</s>\n<s>user: {dialogue}</s>\n<s>assistant: [CLS]"
    prompt = own.prompt(example)
    assert shown(own, prompt.ids) == expected
    tokenizer = own.tokenizer.hf
    assert prompt.ids.count(tokenizer.bos_token_id) == 3
    assert prompt.ids.count(tokenizer.eos_token_id) == 2
    assert shown(own, list(own.answer("change").inputs)) == "change"
    without = prompter(models, llm, prompt={"format": "chat"})
    assert shown(without, without.prompt(example).ids) == f"<s>user: {dialogue}</s>\n<s>assistant: [CLS]"


@pytest.mark.parametrize(
    ("template", "date"),
    [
        ("{{ date_string }}", "26 Jul 2024"),
        (LLAMA_DATE, "26 Jul 2024"),
        ('{{ strftime_now("%Y-%m-%d") }}', "2024-07-26"),
        ('{% if strftime_now is defined %}{{ strftime_now("%A, %d %B %Y") }}{% endif %}', "Friday, 26 July 2024"),
        ('{% set today = strftime_now("%b %-d, %y") %}{{ today }}', "Jul 26, 24"),
    ],
)
def test_the_date_in_a_chat_is_always_the_same(
    template: str, date: str, models: Path, tmp_path: Path, example: Example
) -> None:
    own = prompter(models, with_template(models, tmp_path, f"{template} {CHAT}"), **BARE, prompt={"format": "chat"})
    assert shown(own, own.prompt(example).ids).startswith(f"{date} <s>user: therapist: i want it")


def test_a_template_keeps_its_line_breaks(models: Path, tmp_path: Path, example: Example) -> None:
    own = prompter(models, with_template(models, tmp_path, "\n\n" + CHAT), **BARE, prompt={"format": "chat"})
    tokenizer = own.tokenizer.hf
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert shown(own, own.prompt(example).ids)[: text.index("x")] == text[: text.index("x")]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0]['role'] }}", "does not take this prompt"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "does not take this prompt"),
    ],
)
def test_a_template_that_refuses_the_prompt_is_one_line(
    template: str, reason: str, models: Path, tmp_path: Path, example: Example
) -> None:
    own = prompter(models, with_template(models, tmp_path, template), prompt={"format": "chat"})
    with pytest.raises(ConfigError, match=rf"model\.prompt\.format: the chat template of .*{reason}.*; use plain") as e:
        own.prompt(example)
    assert "\n" not in str(e.value)


def test_a_tokenizer_without_chat_template_is_one_line(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.prompt\.format: .* has no chat template; use plain") as error:
        prompter(models, prompt={"format": "chat"})
    assert "\n" not in str(error.value)


def test_an_utterance_over_the_limit_is_named(models: Path, example: Example) -> None:
    limited = prompter(models, llm={"max_text_tokens": 4})
    with pytest.raises(DataError, match=rf"^utterance {example.id}: \d+ text tokens exceed model\.llm\.max_text") as e:
        limited.prompt(example)
    assert "\n" not in str(e.value)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.llm\.path: cannot load a tokenizer") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("modality", ["text", "speech", "text+speech"])
@pytest.mark.parametrize("task", ["classify", "response"])
def test_what_the_llm_cannot_reach_is_refused(
    task: str, modality: str, models: Path, tmp_path: Path, example: Example
) -> None:
    """To the position: the prompt, then the longest label, or as much as may be generated."""
    asked = replace(example, task=task, answer="change")
    whole = SpeechLLM(settings(models, modality=modality), ANSWERS)
    (prompt,) = whole.prompts([asked])
    labels = whole.answers[task].values()
    needed = len(prompt) + max((len(answer.inputs) for answer in labels), default=whole.config.max_new_tokens)
    for reach in (needed, needed - 1):
        folder = tmp_path / str(reach)
        shutil.copytree(models / "llm", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": reach}))
    assert asked.pcm is not None

    def measured(reach: int) -> int:
        changed = {"modality": modality, "llm": {"path": str(tmp_path / str(reach))}}
        return SpeechLLM(settings(models, **changed), ANSWERS, "meta").measure(asked, len(asked.pcm)).predicted

    assert measured(needed) == whole.answer(asked).predicted
    with pytest.raises(
        DataError, match=rf"utterance {asked.id}: .* up to {needed} positions .* reads {needed - 1} at once;"
    ) as e:
        measured(needed - 1)
    assert "\n" not in str(e.value)
