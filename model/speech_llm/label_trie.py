"""The trie of all label strings, which one forward pass scores together."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.speech_llm.prompt import IGNORE, Answer


def shared_prefixes(answers: Mapping[str, Answer]) -> list[tuple[str, str]]:
    """Return the pairs of labels of which the first one's tokens begin the second one: only EOS distinguishes them."""
    tokens = {label: [token for token in answer.inputs if token >= 0] for label, answer in answers.items()}
    pairs = itertools.permutations(answers, 2)
    return [(short, long) for short, long in pairs if tokens[long][: len(tokens[short])] == tokens[short]]


@dataclass(frozen=True)
class LabelTrie:
    """The inputs of all answers as nodes of a tree, in which every node attends to its ancestors only."""

    nodes: tuple[int, ...]  # input token of each node
    parents: tuple[int, ...]  # -1: the end of the prompt
    paths: tuple[tuple[tuple[int, int], ...], ...]  # for each label: (node that predicts, target)

    @property
    def ancestors(self) -> list[list[bool]]:
        """The attention mask [node][ancestor]; a node is its own ancestor."""
        rows = [[False] * len(self.nodes) for _ in self.nodes]
        for node, row in enumerate(rows):
            ancestor = node
            while ancestor >= 0:
                row[ancestor] = True
                ancestor = self.parents[ancestor]
        return rows


def label_trie(answers: Sequence[Answer]) -> LabelTrie:
    """Merge the common prefixes of answers."""
    nodes: list[int] = []
    parents: list[int] = []
    node_of_prefix: dict[tuple[int, ...], int] = {(): -1}
    paths = []
    for answer in answers:
        for length in range(1, len(answer.inputs) + 1):
            prefix = answer.inputs[:length]
            if prefix not in node_of_prefix:
                node_of_prefix[prefix] = len(nodes)
                nodes.append(prefix[-1])
                parents.append(node_of_prefix[prefix[:-1]])
        steps = ((node_of_prefix[answer.inputs[:index]], target) for index, target in enumerate(answer.targets))
        paths.append(tuple((node, target) for node, target in steps if target != IGNORE))
    return LabelTrie(tuple(nodes), tuple(parents), tuple(paths))
