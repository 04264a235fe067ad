"""Dialogues → token ids: the prompt of an utterance and the answer (a label and EOS) that follows it.

    <bos>therapist: how have you been\nclient: [text] [CLIP] [END]\nlabel: [CLS]  |  change [CLS] <eos>
          └ history, oldest turn first ┘ └ the utterance, as text, sound or both    └ the answer

[CLIP] is one placeholder, expanded to the clip's embeddings inside the model; [END] and [CLS] are learned vectors.
Every segment is tokenised by itself, so that dropping a turn never changes the tokens of another.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer

from data.errors import ConfigError, DataError, reason
from data.examples import Example
from model.config import ModelConfig

CLIP, END, CLS = -1, -2, -3  # placeholders among token ids
IGNORE = -100  # a target that is not predicted


@dataclass
class Vocabulary:
    """A tokenizer with a cache: the turns of a dialogue are tokenised once for all examples, epochs and trials."""

    tokenizer: Any
    _cache: dict[str, list[int]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """Token ids of a segment, without special tokens."""
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]


@functools.lru_cache(maxsize=2)
def load_vocabulary(path: str) -> Vocabulary:
    """Load the tokenizer of an LLM once per process."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.llm.path: cannot load a tokenizer from {path}: {reason(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.llm.path: the tokenizer of {path} has no EOS token, which ends every label; set one")
    return Vocabulary(tokenizer)


@dataclass(frozen=True)
class Prompt:
    """Token ids and placeholders of an example up to its answer."""

    ids: list[int]
    dropped_turns: int  # turns of history that did not fit


@dataclass(frozen=True)
class Answer:
    """A label as it is read and predicted: `targets[k]` is predicted after the prompt and `inputs[:k]`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class Prompter:
    """Writes prompts and answers for one configuration."""

    def __init__(self, vocabulary: Vocabulary, config: ModelConfig) -> None:
        self.vocabulary = vocabulary
        self.config = config

    def prompt(self, example: Example) -> Prompt:
        """The prompt of an example; turns are dropped from the oldest on until the text fits.

        Raises:
            DataError: the utterance alone is longer than the limit.
        """
        ids, tokenizer, config = self.vocabulary.ids, self.vocabulary.tokenizer, self.config
        current = list(ids(f"{example.speaker}:"))
        if "text" in config.modality:
            current += ids(f" {example.text}")
        if config.hears:
            current += [CLIP] if config.end_of_audio == "none" else [CLIP, END]
        current += ids("\nlabel:") + ([CLS] if config.cls == "before" else [])
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        room = config.llm.max_text_tokens - len(start) - sum(token >= 0 for token in current)
        if room < 0:
            raise DataError(
                f"utterance {example.id}: {config.llm.max_text_tokens - room} text tokens exceed "
                f"model.llm.max_text_tokens ({config.llm.max_text_tokens}); raise it"
            )
        kept: list[list[int]] = []
        for speaker, text in reversed(example.history):
            turn = ids(f"{speaker}: {text}\n")
            if len(turn) > room:
                break
            kept.append(turn)
            room -= len(turn)
        history = [token for turn in reversed(kept) for token in turn]
        return Prompt(start + history + current, len(example.history) - len(kept))

    def answer(self, label: str) -> Answer:
        """The label's tokens, [CLS] if it follows them, and EOS as the last target."""
        tokens = tuple(self.vocabulary.ids(f" {label}"))
        eos: int = self.vocabulary.tokenizer.eos_token_id
        if self.config.cls == "after":
            return Answer((*tokens, CLS), (*tokens, IGNORE, eos))
        return Answer(tokens, (*tokens, eos))


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
