"""Prompts: the layout of the sequence, and what is dropped when it does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import ConfigError, DataError
from data.examples import Example
from model.prompt import CLIP, CLS, END, Prompter, load_vocabulary
from tests.model.common import settings


def prompter(models: Path, **changed: Any) -> Prompter:
    return Prompter(load_vocabulary(str(models / "llm")), settings(models, **changed))


def written(prompter: Prompter, ids: list[int]) -> str:
    names = {CLIP: "[CLIP]", END: "[END]", CLS: "[CLS]"}
    tokenizer = prompter.vocabulary.tokenizer
    return "".join(names[token] if token < 0 else tokenizer.decode([token]) for token in ids)


@pytest.fixture
def example(examples: list[Example]) -> Example:
    return replace(examples[2], history=(("therapist", "i want it"), ("client", "so")), text="really now")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"modality": "text", "cls": "none"}, "client: really now\nlabel:"),
        ({"modality": "speech", "cls": "none"}, "client:[CLIP][END]\nlabel:"),
        ({"modality": "text+speech", "end_of_audio": "none"}, "client: really now[CLIP]\nlabel:[CLS]"),
        ({"modality": "text", "cls": "after"}, "client: really now\nlabel:"),
    ],
)
def test_the_layout(models: Path, example: Example, changed: dict[str, str], expected: str) -> None:
    own = prompter(models, **changed)
    prompt = own.prompt(example)
    start = own.vocabulary.tokenizer.bos_token
    assert written(own, prompt.ids) == f"{start}therapist: i want it\nclient: so\n{expected}"
    assert prompt.dropped_turns == 0


def test_the_answer_ends_with_eos_and_cls_may_stand_before_it(models: Path) -> None:
    eos = load_vocabulary(str(models / "llm")).tokenizer.eos_token_id
    plain, after = (prompter(models, cls=cls).answer("change") for cls in ("none", "after"))
    assert plain.targets == (*plain.inputs, eos)
    assert after.inputs == (*plain.inputs, CLS)
    assert len(after.targets) == len(after.inputs) + 1
    assert after.targets[-1] == eos


def test_whole_turns_are_dropped_from_the_oldest_on(models: Path, example: Example) -> None:
    full = len(prompter(models, modality="text", cls="none").prompt(example).ids)
    limited = prompter(
        models, modality="text", cls="none", llm={"path": str(models / "llm"), "max_text_tokens": full - 1}
    )
    prompt = limited.prompt(example)
    assert prompt.dropped_turns == 1
    assert written(limited, prompt.ids).endswith("client: so\nclient: really now\nlabel:")


def test_an_utterance_over_the_limit_is_named(models: Path, example: Example) -> None:
    limited = prompter(models, llm={"path": str(models / "llm"), "max_text_tokens": 4})
    with pytest.raises(DataError, match=rf"utterance {example.id}: \d+ text tokens exceed"):
        limited.prompt(example)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.llm\.path: cannot load a tokenizer") as error:
        load_vocabulary(str(tmp_path))
    assert "\n" not in str(error.value)
