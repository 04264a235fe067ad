"""The trie of all label strings, scored in one forward pass."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.speech_llm.prompt import IGNORE, Answer


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
