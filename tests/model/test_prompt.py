"""Prompts: the layout of the sequence, what is dropped when it does not fit, and what cannot be written at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def builder(models: Path, folder: Path | None = None, **changed: Any) -> PromptBuilder:
    path = folder or models / "llm"
    changed["llm"] = {"path": str(path)} | changed.get("llm", {})
    return PromptBuilder(load_tokenizer(str(path)), settings(models, **changed))


def text_of(prompts: PromptBuilder, ids: list[int]) -> str:
    names = {CLIP: "[CLIP]", END: "[END]", CLS: "[CLS]"}
    return "".join(names[token] if token < 0 else prompts.tokenizer.hf.decode([token]) for token in ids)


def prompt_text(prompts: PromptBuilder, example: Example) -> str:
    """Return the prompt without its first token."""
    text = text_of(prompts, prompts.prompt(example).ids)
    start = prompts.tokenizer.hf.bos_token
    assert text.startswith(start)
    return text.removeprefix(start)


def with_template(models: Path, folder: Path, template: str) -> Path:
    """Save a tokenizer that has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def example(examples: list[Example]) -> Example:
    turns = (("therapist", "i want it"), ("client", "so"), ("client", "really now"))
    return replace(examples[2], turns=turns, audio_turn=2)


@pytest.fixture
def reply(example: Example) -> Example:
    """An example whose last clip is in the middle of the dialogue."""
    turns = (("therapist", "how are you"), ("client", "well so"), ("therapist", "go on"), ("client", "maybe"))
    return replace(example, task="response", speaker="therapist", answer="tell me more", turns=turns, audio_turn=1)


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
def test_layout_of_every_modality(models: Path, example: Example, changed: dict[str, Any], expected: str) -> None:
    prompts = builder(models, **changed)
    assert prompt_text(prompts, example) == f"therapist: i want it\nclient: so\n{expected}"
    assert prompts.prompt(example).dropped_turns == 0


def test_separator_roles_and_empty_text(models: Path, example: Example) -> None:
    expected = "therapist: i want it [SEP] client: so [SEP] client: really now[CLIP][END] [SEP] label:[CLS]"
    assert prompt_text(builder(models, prompt={"separator": " [SEP] "}), example) == expected
    renamed = builder(models, **BARE, prompt={"roles": {"client": "Patient"}})
    assert prompt_text(renamed, example) == "therapist: i want it\nPatient: so\nPatient: really now\nlabel:"
    forecast = replace(example, task="forecast")
    assert prompt_text(renamed, forecast).endswith("\nnext Patient label:")
    assert prompt_text(renamed, replace(forecast, speaker="therapist")).endswith("\nnext therapist label:")
    silent = replace(example, turns=(*example.turns[:-1], ("client", "")))
    assert prompt_text(builder(models), silent).endswith("client: so\nclient:[CLIP][END]\nlabel:[CLS]")
    assert prompt_text(builder(models, **BARE), silent).endswith("client: so\nclient:\nlabel:")


CUES = {
    "classify": "label:",
    "client_talk": "talk type:",
    "therapist_behaviour": "behaviour:",
    "forecast": "next client label:",
    "response": "client:",
    "quality": "session quality:",
}


@pytest.mark.parametrize("task", TASKS)
def test_instruction_comes_first_and_cue_last(task: str, models: Path, example: Example) -> None:
    asked = replace(example, task=task)
    dialogue = prompt_text(builder(models, **BARE), asked)
    assert dialogue.endswith(f"now\n{CUES[task]}")
    for setting, text in (("task", TASKS[task].instruction), ("say what it is", "say what it is")):
        prompts = builder(models, **BARE, prompt={"instruction": setting})
        assert prompt_text(prompts, asked) == f"{text}\n{dialogue}"


def test_oldest_turns_are_dropped_first(models: Path, example: Example) -> None:
    """The turns that stay keep their tokens."""
    full = builder(models, **BARE).prompt(example).ids
    limited = builder(models, **BARE, llm={"max_text_tokens": len(full) - 1})
    prompt = limited.prompt(example)
    assert prompt.dropped_turns == 1
    assert prompt_text(limited, example) == "client: so\nclient: really now\nlabel:"
    assert full[-len(prompt.ids) + 1 :] == prompt.ids[1:]
    for history, text, dropped in ((len(full), len(full), 0), (len(full), len(full) - 1, 1), (0, len(full), 2)):
        limits = builder(models, **BARE, prompt={"history_tokens": history}, llm={"max_text_tokens": text})
        assert limits.prompt(example).dropped_turns == dropped


def test_history_tokens_limits_earlier_turns(models: Path, example: Example) -> None:
    turns = ["therapist: i want it\n", "client: so\n"]
    history = sum(len(builder(models).tokenizer.ids(turn)) for turn in turns)
    for limit, kept in ((history, turns), (history - 1, turns[1:]), (0, [])):
        prompts = builder(models, **BARE, prompt={"history_tokens": limit})
        assert prompt_text(prompts, example) == f"{''.join(kept)}client: really now\nlabel:"
        assert prompts.prompt(example).dropped_turns == 2 - len(kept)


def test_audio_turn_is_never_dropped(models: Path, reply: Example) -> None:
    """Without audio, all turns but the last are history."""
    prompts = builder(models, prompt={"history_tokens": 0})
    expected = "client: well so[CLIP][END]\ntherapist: go on\nclient: maybe\ntherapist:[CLS]"
    assert prompt_text(prompts, reply) == expected
    prompt = prompts.prompt(reply)
    assert prompt.dropped_turns == 1
    n_text = sum(token >= 0 for token in prompt.ids)  # placeholders are not text
    assert builder(models, llm={"max_text_tokens": n_text}).prompt(reply) == prompt
    with pytest.raises(DataError, match=rf"^utterance {reply.id}: {n_text} text tokens exceed model\.llm\.max_") as e:
        builder(models, llm={"max_text_tokens": n_text - 1}).prompt(reply)
    assert "\n" not in str(e.value)
    text = builder(models, **BARE, prompt={"history_tokens": 0})
    assert prompt_text(text, reply) == "client: maybe\ntherapist:"
    assert text.prompt(reply).dropped_turns == 3


def test_answers_end_with_eos_and_are_plain_words(models: Path) -> None:
    eos = load_tokenizer(str(models / "llm")).hf.eos_token_id
    plain, after = (builder(models, cls=cls).answer("change") for cls in ("none", "after"))
    assert plain.targets == (*plain.inputs, eos)
    assert after.inputs == (*plain.inputs, CLS)
    assert after.targets == (*plain.inputs, IGNORE, eos)
    assert plain.predicted == after.predicted == len(plain.inputs) + 1
    assert answer_text("classify", "follow_neutral") == "follow neutral"
    assert answer_text("classify", "change|giving_info") == "change, giving info"
    assert answer_text("response", " well+then \n go_on ") == "well+then go_on"
    prompts = builder(models)
    answers = prompts.label_answers("classify", ("change", "sustain", "change|sustain"))
    texts = [text_of(prompts, list(answer.inputs)) for answer in answers.values()]
    assert texts == [" change", " sustain", " change, sustain"]
    assert shared_prefixes(answers) == [("change", "change|sustain")]
    assert shared_prefixes({label: answers[label] for label in ("change", "sustain")}) == []


def test_special_token_in_a_transcript_is_plain_text(models: Path, tmp_path: Path, example: Example) -> None:
    prompts = builder(models, **BARE)
    chat = builder(models, with_template(models, tmp_path, CHAT), **BARE, prompt={"format": "chat"})
    tokenizer = prompts.tokenizer.hf
    for special in ("</s>", "<s>", "<pad>"):
        turns = (("therapist", f"i {special} it"), ("client", f"{special} so {special}"))
        spelt = replace(example, turns=turns, audio_turn=1)
        assert tokenizer(special, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(special)]
        assert not set(prompts.prompt(spelt).ids[1:]) & set(tokenizer.all_special_ids)
        assert prompt_text(prompts, spelt) == f"therapist: i {special} it\nclient: {special} so {special}\nlabel:"
        assert not set(prompts.answer(special).inputs) & set(tokenizer.all_special_ids)
        specials = [token for token in chat.prompt(spelt).ids if token in tokenizer.all_special_ids]
        assert specials == tokenizer("<s></s><s>", add_special_tokens=False)["input_ids"]


def test_chat_format_uses_the_chat_template(models: Path, tmp_path: Path, example: Example) -> None:
    """The template's special tokens are special, and no other start precedes it."""
    llm = with_template(models, tmp_path, CHAT)
    prompts = builder(models, llm, prompt={"format": "chat", "instruction": "task"})
    dialogue = "therapist: i want it\nclient: so\nclient: really now[CLIP][END]\nlabel:"
    expected = f"<s>system: {TASKS['classify'].instruction}</s>\n<s>user: {dialogue}</s>\n<s>assistant: [CLS]"
    prompt = prompts.prompt(example)
    assert text_of(prompts, prompt.ids) == expected
    assert prompt.ids.count(prompts.tokenizer.hf.bos_token_id) == 3
    assert prompt.ids.count(prompts.tokenizer.hf.eos_token_id) == 2
    assert text_of(prompts, list(prompts.answer("change").inputs)) == "change"
    bare = builder(models, llm, prompt={"format": "chat"})
    assert text_of(bare, bare.prompt(example).ids) == f"<s>user: {dialogue}</s>\n<s>assistant: [CLS]"


@pytest.mark.parametrize(
    ("template", "date"),
    [
        ("{{ date_string }}", "26 Jul 2024"),
        (LLAMA_DATE, "26 Jul 2024"),
        ('{{ strftime_now("%Y-%m-%d") }}', "2024-07-26"),
        ('{% if strftime_now is defined %}{{ strftime_now("%A, %d %B %Y") }}{% endif %}', "Friday, 26 July 2024"),
        ('{% set today = strftime_now("%b %-d, %y") %}{{ today }}', "Jul 26, 24"),
        ("\n\nstart", "\n\nstart"),  # a template keeps its line breaks
    ],
)
def test_chat_template_has_a_fixed_date(
    template: str, date: str, models: Path, tmp_path: Path, example: Example
) -> None:
    prompts = builder(models, with_template(models, tmp_path, f"{template} {CHAT}"), **BARE, prompt={"format": "chat"})
    assert text_of(prompts, prompts.prompt(example).ids).startswith(f"{date} <s>user: therapist: i want it")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0]['role'] }}", "does not take this prompt"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "does not take this prompt"),
    ],
)
def test_template_that_refuses_the_prompt_is_one_line(
    template: str, reason: str, models: Path, tmp_path: Path, example: Example
) -> None:
    prompts = builder(models, with_template(models, tmp_path, template), prompt={"format": "chat"})
    with pytest.raises(ConfigError, match=rf"model\.prompt\.format: the chat template of .*{reason}.*; use plain") as e:
        prompts.prompt(example)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("modality", ["text", "speech", "text+speech"])
@pytest.mark.parametrize("task", ["classify", "response"])
def test_examples_beyond_the_llm_are_refused(
    task: str, modality: str, models: Path, tmp_path: Path, example: Example
) -> None:
    """To the position: the prompt, then the longest label or as many tokens as may be generated."""
    asked = replace(example, task=task, answer="change")
    whole = SpeechLLM(settings(models, modality=modality), ANSWERS)
    (prompt,) = whole.prompts([asked])
    labels = whole.answers[task].values()
    needed = len(prompt) + max((len(answer.inputs) for answer in labels), default=whole.config.max_new_tokens)
    assert asked.pcm is not None

    def predicted(limit: int) -> int:
        folder = shutil.copytree(models / "llm", tmp_path / str(limit))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": limit}))
        limited = SpeechLLM(settings(models, modality=modality, llm={"path": str(folder)}), ANSWERS, "meta")
        return limited.measure(asked, len(asked.pcm)).predicted

    assert predicted(needed) == whole.answer(asked).predicted
    expected = rf"utterance {asked.id}: .* up to {needed} positions .* reads {needed - 1} at once;"
    with pytest.raises(DataError, match=expected) as e:
        predicted(needed - 1)
    assert "\n" not in str(e.value)


# The start of a prompt ------------------------------------------------------------------------------------------------


def with_start(models: Path, folder: Path, single: str) -> Path:
    """Save a tokenizer that puts other tokens around a text, and has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(with_template(models, folder, CHAT))
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>", "<pad>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("single", "starts"),
    [
        ("$A", {"auto": "", "always": "<s>", "never": ""}),  # as SmolLM2, whose BOS begins the messages of a chat
        ("<s> $A", {"auto": "<s>", "always": "<s>", "never": ""}),  # as Llama
        ("<pad> <s> $A </s>", {"auto": "<pad><s>", "always": "<s>", "never": ""}),  # as GLM; what follows is left out
    ],
)
def test_plain_prompt_starts_as_the_tokenizer_does(
    single: str, starts: dict[str, str], models: Path, tmp_path: Path, example: Example
) -> None:
    llm = with_start(models, tmp_path, single)
    for bos, start in starts.items():
        prompts = builder(models, llm, **BARE, prompt={"bos": bos})
        assert text_of(prompts, prompts.prompt(example).ids).startswith(f"{start}therapist: i want it\n")
        chat = builder(models, llm, **BARE, prompt={"bos": bos, "format": "chat"})
        assert text_of(chat, chat.prompt(example).ids).startswith("<s>user: therapist: i want it\n")  # one BOS


def test_tokenizer_without_bos_never_adds_one(models: Path, words_only: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words_only)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(words_only)
    for bos in ("auto", "always", "never"):
        prompts = builder(models, words_only, **BARE, prompt={"bos": bos, "separator": " [SEP] "})
        assert prompts.tokenizer.hf.bos_token_id is None
        assert prompts.start == []


# Tokenizers that lack what a prompt or an answer needs ----------------------------------------------------------------


@pytest.fixture
def words_only(tmp_path: Path) -> Path:
    """A tokenizer that has a vocabulary of a few words."""
    words = "<unk> <s> </s> client therapist : label [SEP] change sustain".split()
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_words_outside_the_vocabulary_are_refused(models: Path, words_only: Path) -> None:
    roles = {"separator": " [SEP] ", "roles": {"client": "Patient"}}
    for prompt, key in (
        ({"separator": " [END] "}, r"model\.prompt\.separator: ' \[END\] '"),
        (roles, r"model\.prompt\.roles\.client: 'Patient'"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key} is not in the vocabulary of .*; use other words") as error:
            builder(models, words_only, prompt=prompt)
        assert "\n" not in str(error.value)


def test_labels_that_cannot_be_told_apart_are_refused(models: Path, words_only: Path) -> None:
    prompts = builder(models, words_only, prompt={"separator": " [SEP] "})
    assert prompts.label_answers("classify", ("change", "sustain")).keys() == {"change", "sustain"}
    with pytest.raises(ConfigError, match=r"^label 'neutral': 'neutral' is not in the vocabulary"):
        prompts.label_answers("classify", ("change", "neutral"))
    with pytest.raises(ConfigError, match=r"^labels 'go_on' and 'go on' have the same tokens; rename one"):
        builder(models).label_answers("classify", ("go_on", "change", "go on"))


def test_unusable_tokenizers_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.prompt\.format: .* has no chat template; use plain"):
        builder(models, prompt={"format": "chat"})
    with pytest.raises(ConfigError, match=r"model\.llm\.path: cannot load a tokenizer") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.llm\.path: .* has no EOS token, which ends every answer"):
        load_tokenizer(str(tmp_path))
