"""Vocabularies that lack what a prompt or an answer needs are refused in one line."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.errors import ConfigError
from model.speech_llm.tokenizer import load_tokenizer
from tests.model.test_prompt import prompter


@pytest.fixture
def words_only(tmp_path: Path) -> Path:
    """A tokenizer that knows these words and none else."""
    known = "<unk> <s> </s> client therapist : label [SEP] change sustain".split()
    core = Tokenizer(WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ({"separator": " [END] "}, r"model\.prompt\.separator: ' \[END\] '"),
        ({"separator": " [SEP] ", "roles": {"client": "Patient"}}, r"model\.prompt\.roles\.client: 'Patient'"),
    ],
)
def test_what_the_vocabulary_lacks_is_refused(prompt: dict[str, Any], key: str, models: Path, words_only: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is not in the vocabulary of .*; use other words") as error:
        prompter(models, words_only, prompt=prompt)
    assert "\n" not in str(error.value)


def test_labels_that_the_vocabulary_lacks_are_refused(models: Path, words_only: Path) -> None:
    own = prompter(models, words_only, prompt={"separator": " [SEP] "})
    assert own.label_answers("classify", ("change", "sustain")).keys() == {"change", "sustain"}
    with pytest.raises(ConfigError, match=r"^label 'neutral': 'neutral' is not in the vocabulary"):
        own.label_answers("classify", ("change", "neutral"))


def test_labels_with_the_same_tokens_are_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"^labels 'go_on' and 'go on' have the same tokens; rename one"):
        prompter(models).label_answers("classify", ("go_on", "change", "go on"))


def test_a_tokenizer_without_eos_is_refused(models: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.llm\.path: .* has no EOS token, which ends every answer"):
        load_tokenizer(str(tmp_path))
