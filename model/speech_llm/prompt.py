"""Write a dialogue as token ids: the prompt of an example, and the answer (a label or a reply) that follows it.

    <bos>therapist: how have you been\nclient: [text] [CLIP] [END]\nlabel: [CLS]  |  change [CLS] <eos>
          └ history, oldest turn first ┘ └ the audio turn: text, audio or both  └ the answer

[CLIP] is one placeholder, which the model replaces by the embeddings of the clip; [END] and [CLS] are learned vectors.
Every segment is tokenised by itself, so dropping a turn never changes the tokens of the other turns.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from data.corpus.schema import split_label
from data.errors import ConfigError, MisfitError
from data.loading.examples import Example
from data.loading.tasks import TASKS
from model.checkpoints.audio_llms import audio_family
from model.config import ModelConfig
from model.speech_llm.tokenizer import CachedTokenizer

CLIP, END, CLS = -1, -2, -3  # placeholders among token ids
IGNORE = -100  # a target that is not predicted


@dataclass(frozen=True)
class Prompt:
    """Token ids and placeholders of an example up to its answer."""

    ids: list[int]
    dropped_turns: int  # turns of history that did not fit


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer: `targets[k]` is predicted from the prompt and `inputs[:k]`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def predicted(self) -> int:
        """The number of predicted tokens, EOS included."""
        return sum(target != IGNORE for target in self.targets)


class PromptBuilder:
    """Write prompts and answers for one configuration.

    Raises:
        ConfigError: the tokenizer has no chat template, or no tokens for something that every prompt contains.
    """

    def __init__(self, tokenizer: CachedTokenizer, config: ModelConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        if config.prompt.format == "chat" and not tokenizer.hf.chat_template:
            raise ConfigError(
                f"model.prompt.format: the tokenizer of {config.llm.path} has no chat template; use plain, or an "
                "instruction-tuned model"
            )
        self._check_in_vocabulary(config.prompt.separator, "model.prompt.separator")
        for role, name in config.prompt.roles.items():
            self._check_in_vocabulary(name, f"model.prompt.roles.{role}")

    def _check_in_vocabulary(self, text: str, key: str) -> None:
        unknown = self.tokenizer.hf.unk_token_id
        if unknown is not None and unknown in self.tokenizer.ids(text):
            raise ConfigError(
                f"{key}: {text!r} is not in the vocabulary of {self.config.llm.path}; use other words, or add a token"
            )

    @functools.cached_property
    def start(self) -> list[int]:
        """The token ids at the beginning of a plain prompt."""
        if self.config.prompt.bos == "auto":
            return self.tokenizer.start
        bos = self.tokenizer.hf.bos_token_id
        return [] if bos is None or self.config.prompt.bos == "never" else [bos]

    @functools.cached_property
    def clip_frame(self) -> tuple[list[int], list[int]]:
        """The token ids before and after a clip, which the family of an audio LLM puts there.

        Raises:
            ConfigError: the tokenizer lacks one of them.
        """
        family = audio_family(self.config.llm.path) if self.config.encoder.path is None else None
        if family is None:
            return [], []
        tokens = [family.begin, family.end]
        ids = [self.tokenizer.hf.convert_tokens_to_ids(token) if token else None for token in tokens]
        for token, number in zip(tokens, ids, strict=True):
            if token and number in (None, self.tokenizer.hf.unk_token_id):
                raise ConfigError(
                    f"model.llm.path: the tokenizer of {self.config.llm.path} lacks {token}, with which its family "
                    "marks a clip; use the tokenizer that belongs to the model"
                )
        begin, end = ([] if number is None else [number] for number in ids)
        return begin, end

    @functools.cached_property
    def text_only(self) -> "PromptBuilder":
        """A builder that writes the same dialogue for a teacher: text without audio, and without limits of length."""
        unlimited = self.config.llm.model_copy(update={"max_text_tokens": sys.maxsize})
        prompt = self.config.prompt.model_copy(update={"history_tokens": None})
        plain = {"modality": "text", "cls": "none", "end_of_audio": "none", "llm": unlimited, "prompt": prompt}
        return PromptBuilder(self.tokenizer, self.config.model_copy(update=plain))

    def prompt(self, example: Example) -> Prompt:
        """Return the prompt of an example. The oldest turns are dropped until the text fits.

        Raises:
            MisfitError: the audio turn and what follows it are longer than the limit.
        """
        config = self.config
        head, tail = self._frame(example.task, example.speaker)
        audio_turn = example.audio_turn if config.uses_audio else None
        first = len(example.turns) - 1 if audio_turn is None else audio_turn  # everything before it is history
        current = [
            token
            for index in range(first, len(example.turns))
            for token in self._turn(example, index, with_audio=index == audio_turn)
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
        fitting: list[list[int]] = []  # newest turn first
        for index in reversed(range(first)):
            turn = self._turn(example, index, with_audio=False)
            if len(turn) > room:
                break
            fitting.append(turn)
            room -= len(turn)
        history = [token for turn in reversed(fitting) for token in turn]
        return Prompt([*head, *history, *current, *tail], dropped_turns=first - len(fitting))

    def _frame(self, task: str, speaker: str) -> tuple[list[int], list[int]]:
        """Return the token ids before and after the dialogue."""
        ids, config = self.tokenizer.ids, self.config.prompt
        instruction = TASKS[task].instruction if config.instruction == "task" else config.instruction
        cue = ids(TASKS[task].cue.format(role=config.roles.get(speaker, speaker)) + ":")
        cls = [CLS] if self.config.cls == "before" else []
        if config.format == "chat":
            before, after = self.tokenizer.chat_template_ids(instruction)
            return before, [*cue, *after, *cls]
        return [*self.start, *(ids(instruction + config.separator) if instruction else [])], [*cue, *cls]

    def _turn(self, example: Example, index: int, with_audio: bool) -> list[int]:
        """Return the token ids and placeholders of one turn."""
        ids, config = self.tokenizer.ids, self.config
        role, text = example.turns[index]
        name, separator = config.prompt.roles.get(role, role), config.prompt.separator
        spaced = f" {text}" if text else ""
        if not with_audio:
            return ids(f"{name}:{spaced}{separator}")
        text_ids = ids(spaced) if "text" in config.modality else []
        before, after = self.clip_frame
        clip_ids = [*before, CLIP, *after, *([] if config.end_of_audio == "none" else [END])]
        parts = [text_ids, clip_ids] if config.prompt.order == "text-sound" else [clip_ids, text_ids]
        return [*ids(f"{name}:"), *parts[0], *parts[1], *ids(separator)]

    def answer(self, text: str) -> Answer:
        """Return an answer: its tokens, [CLS] if it follows them, and EOS as the last target."""
        lead = "" if self.config.prompt.format == "chat" else " "
        tokens = tuple(self.tokenizer.ids(lead + text))
        eos: int = self.tokenizer.hf.eos_token_id
        if self.config.cls == "after":
            return Answer((*tokens, CLS), (*tokens, IGNORE, eos))
        return Answer(tokens, (*tokens, eos))

    def label_answers(self, task: str, labels: Sequence[str]) -> dict[str, Answer]:
        """Return the answers of a label set, by label.

        Raises:
            ConfigError: a label is not in the vocabulary, or two labels have the same tokens.
        """
        answers: dict[str, Answer] = {}
        label_of_inputs: dict[tuple[int, ...], str] = {}
        for label in labels:
            text = answer_text(task, label)
            self._check_in_vocabulary(text, f"label {label!r}")
            answers[label] = self.answer(text)
            twin = label_of_inputs.setdefault(answers[label].inputs, label)
            if twin != label:
                raise ConfigError(f"labels {twin!r} and {label!r} have the same tokens; rename one of them")
        return answers


def answer_text(task: str, answer: str) -> str:
    """Return an answer as the model writes it; several labels of one turn are separated by commas."""
    if TASKS[task].answer == "text":
        return " ".join(answer.split())
    return ", ".join(split_label(answer)).replace("_", " ")
