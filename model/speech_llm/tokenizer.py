"""The tokenizer of an LLM, with a cache of segments and its chat template."""

import functools
import itertools
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.errors import ConfigError, UnavailableError, reason
from model.checkpoints.audio_llms import audio_family
from model.runtime.memory import Stamp, folder_stamp

DIALOGUE = "\x00"  # marks the position of the dialogue in a chat template
# A chat template that writes today's date would make another prompt every day, so the date is fixed. Some templates
# read it from `date_string`; others call `strftime_now`, which the macro CLOCK replaces.
DATE = "26 Jul 2024"
DATE_CODES = {
    "%d": "26",
    "%-d": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%a": "Fri",
    "%A": "Friday",
}
CLOCK = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f" | replace({code!r}, {value!r})" for code, value in DATE_CODES.items())
    + " }}{% endmacro +%}"
)


@dataclass
class CachedTokenizer:
    """A tokenizer that tokenises each turn of a dialogue once for all examples, epochs and trials."""

    hf: PreTrainedTokenizerBase
    _ids: dict[str, list[int]] = field(default_factory=dict)
    _chat_ids: dict[str | None, tuple[list[int], list[int]]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a segment. A special token that a transcript spells out is plain text."""
        if text not in self._ids:
            encoded = self.hf(text, add_special_tokens=False, split_special_tokens=True)
            self._ids[text] = encoded["input_ids"]
        return self._ids[text]

    def n_embedded(self, path: str) -> int:
        """Return the number of tokens that an LLM must embed. No prompt has the token that stands for a clip, and some
        audio LLMs have no embedding for it."""
        if (family := audio_family(path)) is None:
            return len(self.hf)
        vocabulary: dict[str, int] = self.hf.get_vocab()
        return 1 + max(number for token, number in vocabulary.items() if token != family.placeholder)

    @functools.cached_property
    def start(self) -> list[int]:
        """Return the special tokens that the tokenizer puts in front of every text, mostly BOS or nothing.

        They are read from a tokenised text: `add_bos_token`, post-processors and the classes of some families decide
        about them, and a BOS token may have another purpose. SmolLM2's begins a message of its chat template.
        """
        special = {self.hf.bos_token_id, *self.hf.all_special_ids}
        return list(itertools.takewhile(special.__contains__, self.hf("label")["input_ids"]))

    def chat_template_ids(self, instruction: str | None) -> tuple[list[int], list[int]]:
        """Return the token ids before and after the dialogue in the tokenizer's chat template.

        Raises:
            ConfigError: the template refuses the messages (some have no system role), or drops the dialogue.
        """
        if instruction in self._chat_ids:
            return self._chat_ids[instruction]
        messages = [{"role": "system", "content": instruction}] if instruction else []
        try:
            text = self.hf.apply_chat_template(
                [*messages, {"role": "user", "content": DIALOGUE}],
                chat_template=CLOCK + self.hf.get_chat_template(),
                tokenize=False,
                add_generation_prompt=True,
                date_string=DATE,
            )
            before, after = text.split(DIALOGUE)
        except (TemplateError, ValueError) as error:
            raise ConfigError(
                f"model.prompt.format: the chat template of {self.hf.name_or_path} does not take this prompt: "
                f"{reason(error)}; use plain, or model.prompt.instruction=null"
            ) from None
        start, end = (self.hf(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        self._chat_ids[instruction] = start, end
        return start, end


def load_tokenizer(path: str) -> CachedTokenizer:
    """Load the tokenizer of an LLM once per process, and again if its folder has changed.

    Raises:
        ConfigError: it cannot be loaded, has no EOS token, or yields no tokens.
    """
    return _load_tokenizer(path, folder_stamp(path))


@functools.lru_cache(maxsize=8)
def _load_tokenizer(path: str, stamp: Stamp) -> CachedTokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub raise many types for a broken folder
        raise UnavailableError(f"model.llm.path: cannot load a tokenizer from {path}: {reason(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.llm.path: the tokenizer of {path} has no EOS token, which ends every answer; set one")
    cached = CachedTokenizer(tokenizer)
    if not cached.ids("label"):
        raise ConfigError(f"model.llm.path: the tokenizer of {path} yields no tokens; use a complete model folder")
    return cached
