"""Dialogues → token ids: the prompt of an example and the answer (a label or a reply, and EOS) that follows it.

    <bos>therapist: how have you been\nclient: [text] [CLIP] [END]\nlabel: [CLS]  |  change [CLS] <eos>
          └ history, oldest turn first ┘ └ the heard turn: words, sound or both     └ the answer

[CLIP] is one placeholder, expanded to the clip's embeddings inside the model; [END] and [CLS] are learned vectors.
Every segment is tokenised by itself, so that dropping a turn never changes the tokens of another.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from data.corpus.schema import split_label
from data.errors import ConfigError, MisfitError
from data.loading.examples import Example
from data.loading.tasks import TASKS
from model.config import ModelConfig
from model.speech_llm.tokenizer import Vocabulary

CLIP, END, CLS = -1, -2, -3  # placeholders among token ids
IGNORE = -100  # a target that is not predicted


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
