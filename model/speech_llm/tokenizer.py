"""The tokenizer of an LLM, with its chat template."""

import functools
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from data.errors import ConfigError, reason

DIALOGUE = "\x00"  # where the dialogue goes in a chat template
DATE = "26 Jul 2024"  # a chat template that writes today's date would make another prompt every day
DATE_CODES = {"%d": "26", "%-d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24"} | {
    "%a": "Fri",
    "%A": "Friday",
}


# Some templates take the date as `date_string`; others call `strftime_now`, for which this stands in.
CLOCK = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f" | replace({code!r}, {value!r})" for code, value in DATE_CODES.items())
    + " }}{% endmacro +%}"
)


@dataclass
class Vocabulary:
    """A tokenizer with a cache: the turns of a dialogue are tokenised once for all examples, epochs and trials."""

    tokenizer: Any
    _cache: dict[str, list[int]] = field(default_factory=dict)
    _frames: dict[str | None, tuple[list[int], list[int]]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """Token ids of a segment, without special tokens: one that is spelt out in a transcript is plain text."""
        if text not in self._cache:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            self._cache[text] = encoded["input_ids"]
        return self._cache[text]

    def chat_frame(self, instruction: str | None) -> tuple[list[int], list[int]]:
        """Token ids before and after the dialogue in the tokenizer's chat template.

        Raises:
            ConfigError: the template refuses the messages (some know no system role), or loses the dialogue.
        """
        if instruction in self._frames:
            return self._frames[instruction]
        messages = [{"role": "system", "content": instruction}] if instruction else []
        try:
            text = self.tokenizer.apply_chat_template(
                [*messages, {"role": "user", "content": DIALOGUE}],
                chat_template=CLOCK + self.tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=True,
                date_string=DATE,
            )
            before, after = text.split(DIALOGUE)
        except (TemplateError, ValueError) as error:
            raise ConfigError(
                f"model.prompt.format: the chat template of {self.tokenizer.name_or_path} does not take this prompt: "
                f"{reason(error)}; use plain, or model.prompt.instruction=null"
            ) from None
        start, end = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        self._frames[instruction] = start, end
        return start, end


@functools.lru_cache(maxsize=8)
def load_vocabulary(path: str) -> Vocabulary:
    """Load the tokenizer of an LLM once per process."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the folder's fault, and the libraries have errors of their own
        raise ConfigError(f"model.llm.path: cannot load a tokenizer from {path}: {reason(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.llm.path: the tokenizer of {path} has no EOS token, which ends every answer; set one")
    vocabulary = Vocabulary(tokenizer)
    if not vocabulary.ids("label"):
        raise ConfigError(
            f"model.llm.path: the tokenizer of {path} gives no tokens; use a complete folder of the model"
        )
    return vocabulary
