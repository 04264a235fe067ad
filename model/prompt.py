"""Dialogues → token ids: the prompt of an example and the answer (a label or a reply, and EOS) that follows it.

    <bos>therapist: how have you been\nclient: [text] [CLIP] [END]\nlabel: [CLS]  |  change [CLS] <eos>
          └ history, oldest turn first ┘ └ the heard turn: words, sound or both     └ the answer

[CLIP] is one placeholder, expanded to the clip's embeddings inside the model; [END] and [CLS] are learned vectors.
Every segment is tokenised by itself, so that dropping a turn never changes the tokens of another.
"""

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from data.errors import ConfigError, MisfitError, reason
from data.examples import Example
from data.schema import split_label
from data.tasks import TASKS
from model.config import ModelConfig

CLIP, END, CLS = -1, -2, -3  # placeholders among token ids
IGNORE = -100  # a target that is not predicted
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


@dataclass(frozen=True)
class Prompt:
    """Token ids and placeholders of an example up to its answer."""

    ids: list[int]
    dropped_turns: int  # turns of history that did not fit


@dataclass(frozen=True)
class Answer:
    """A text as it is read and predicted: `targets[k]` is predicted after the prompt and `inputs[:k]`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def predicted(self) -> int:
        """How many tokens are predicted, EOS included."""
        return sum(target != IGNORE for target in self.targets)


class Prompter:
    """Writes prompts and answers for one configuration.

    Raises:
        ConfigError: the tokenizer has no chat template, or no tokens for something that every prompt contains.
    """

    def __init__(self, vocabulary: Vocabulary, config: ModelConfig) -> None:
        self.vocabulary, self.config = vocabulary, config
        tokenizer = vocabulary.tokenizer
        if config.prompt.format == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                f"model.prompt.format: the tokenizer of {config.llm.path} has no chat template; use plain, or an "
                "instruction-tuned model"
            )
        self._check(config.prompt.separator, "model.prompt.separator")
        for role, name in config.prompt.roles.items():
            self._check(name, f"model.prompt.roles.{role}")

    @functools.cached_property
    def transcriber(self) -> "Prompter":
        """Writes examples as a teacher reads them: words alone, of the turns that it is given."""
        unlimited = self.config.llm.model_copy(update={"max_text_tokens": sys.maxsize})
        prompt = self.config.prompt.model_copy(update={"history_tokens": None})
        plain = {"modality": "text", "cls": "none", "end_of_audio": "none", "llm": unlimited, "prompt": prompt}
        return Prompter(self.vocabulary, self.config.model_copy(update=plain))

    def _check(self, text: str, key: str) -> None:
        unknown = self.vocabulary.tokenizer.unk_token_id
        if unknown is not None and unknown in self.vocabulary.ids(text):
            raise ConfigError(
                f"{key}: {text!r} is not in the vocabulary of {self.config.llm.path}; use other words, or add a token"
            )

    def prompt(self, example: Example) -> Prompt:
        """The prompt of an example; turns are dropped from the oldest on until the text fits.

        Raises:
            MisfitError: the heard turn and what follows it are longer than the limit.
        """
        config = self.config
        head, tail = self._frame(example.task, example.speaker)
        heard = example.heard if config.hears else None
        first = len(example.turns) - 1 if heard is None else heard
        current = [
            token for place in range(first, len(example.turns)) for token in self._turn(example, place, place == heard)
        ]
        fixed = sum(token >= 0 for token in (*head, *current, *tail))
        room = config.llm.max_text_tokens - fixed
        if room < 0:
            raise MisfitError(
                f"utterance {example.id}: {fixed} text tokens exceed model.llm.max_text_tokens "
                f"({config.llm.max_text_tokens}); raise it"
            )
        if config.prompt.history_tokens is not None:
            room = min(room, config.prompt.history_tokens)
        kept: list[list[int]] = []
        for place in reversed(range(first)):
            turn = self._turn(example, place, False)
            if len(turn) > room:
                break
            kept.append(turn)
            room -= len(turn)
        history = [token for turn in reversed(kept) for token in turn]
        return Prompt([*head, *history, *current, *tail], first - len(kept))

    def _frame(self, task: str, speaker: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the dialogue."""
        ids, config = self.vocabulary.ids, self.config.prompt
        words = TASKS[task].instruction if config.instruction == "task" else config.instruction
        cue = ids(TASKS[task].cue.format(role=config.roles.get(speaker, speaker)) + ":")
        vector = [CLS] if self.config.cls == "before" else []
        if config.format == "chat":
            before, after = self.vocabulary.chat_frame(words)
            return before, [*cue, *after, *vector]
        bos = self.vocabulary.tokenizer.bos_token_id
        return [*([] if bos is None else [bos]), *(ids(words + config.separator) if words else [])], [*cue, *vector]

    def _turn(self, example: Example, place: int, heard: bool) -> list[int]:
        """Token ids and placeholders of one turn."""
        ids, config = self.vocabulary.ids, self.config
        role, text = example.turns[place]
        name, separator = config.prompt.roles.get(role, role), config.prompt.separator
        words = f" {text}" if text else ""
        if not heard:
            return ids(f"{name}:{words}{separator}")
        read = ids(words) if "text" in config.modality else []
        sound = [CLIP] if config.end_of_audio == "none" else [CLIP, END]
        parts = [read, sound] if config.prompt.order == "text-sound" else [sound, read]
        return [*ids(f"{name}:"), *parts[0], *parts[1], *ids(separator)]

    def answer(self, text: str) -> Answer:
        """The answer's tokens, [CLS] if it follows them, and EOS as the last target."""
        lead = "" if self.config.prompt.format == "chat" else " "
        tokens = tuple(self.vocabulary.ids(lead + text))
        eos: int = self.vocabulary.tokenizer.eos_token_id
        if self.config.cls == "after":
            return Answer((*tokens, CLS), (*tokens, IGNORE, eos))
        return Answer(tokens, (*tokens, eos))

    def label_answers(self, task: str, labels: Sequence[str]) -> dict[str, Answer]:
        """The answers of a label set.

        Raises:
            ConfigError: a label is not in the vocabulary, or two labels have the same tokens.
        """
        found: dict[str, Answer] = {}
        known: dict[tuple[int, ...], str] = {}
        for label in labels:
            text = written(task, label)
            self._check(text, f"label {label!r}")
            found[label] = self.answer(text)
            twin = known.setdefault(found[label].inputs, label)
            if twin != label:
                raise ConfigError(f"labels {twin!r} and {label!r} have the same tokens; rename one of them")
        return found


def written(task: str, answer: str) -> str:
    """An answer as the model writes it; several labels of one turn stand one after the other."""
    if TASKS[task].answer == "text":
        return " ".join(answer.split())
    return ", ".join(split_label(answer)).replace("_", " ")


def shared_beginnings(answers: Mapping[str, Answer]) -> list[tuple[str, str]]:
    """Pairs of labels whose tokens begin alike, the shorter one first: only EOS tells them apart."""
    tokens = {label: [token for token in answer.inputs if token >= 0] for label, answer in answers.items()}
    pairs = itertools.permutations(answers, 2)
    return [(short, long) for short, long in pairs if tokens[long][: len(tokens[short])] == tokens[short]]


@dataclass(frozen=True)
class LabelTrie:
    """All answers at once: their inputs as nodes of a tree, in which every node sees its ancestors."""

    nodes: tuple[int, ...]  # input of each node
    parents: tuple[int, ...]  # -1: the end of the prompt
    paths: tuple[tuple[tuple[int, int], ...], ...]  # by label: (node that predicts, target)

    @property
    def ancestors(self) -> list[list[bool]]:
        """[node][other]: whether `other` is the node or lies between it and the prompt."""
        rows = [[False] * len(self.nodes) for _ in self.nodes]
        for node, row in enumerate(rows):
            at = node
            while at >= 0:
                row[at] = True
                at = self.parents[at]
        return rows


def label_trie(answers: Sequence[Answer]) -> LabelTrie:
    """Merge answers that share a beginning."""
    nodes: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, ...], int] = {(): -1}
    paths = []
    for answer in answers:
        for length in range(1, len(answer.inputs) + 1):
            prefix = answer.inputs[:length]
            if prefix not in known:
                known[prefix] = len(nodes)
                nodes.append(prefix[-1])
                parents.append(known[prefix[:-1]])
        steps = ((known[answer.inputs[:place]], target) for place, target in enumerate(answer.targets))
        paths.append(tuple((node, target) for node, target in steps if target != IGNORE))
    return LabelTrie(tuple(nodes), tuple(parents), tuple(paths))
