"""Label scores: the trie gives what a plain forward pass for each label gives, and the loss is their negative."""

from pathlib import Path

import pytest
import torch

from data.examples import Example
from model.prompt import CLS, IGNORE, Answer, label_trie
from model.speech_llm import SpeechLLM, pad_left
from tests.model.common import build, close


def naive(model: SpeechLLM, example: Example) -> torch.Tensor:
    """One forward pass over prompt and answer for every label."""
    found = []
    (prompt,) = model._prompts([example])
    for label in model.labels:
        answer = model.answers[label]
        sequence = torch.cat([prompt, model._embed(answer.inputs)])
        logits = model.llm(inputs_embeds=sequence[None], use_cache=False).logits[0, len(prompt) - 1 :].log_softmax(-1)
        found.append(sum(logits[place, token] for place, token in enumerate(answer.targets) if token != IGNORE))
    return torch.stack(found)


@pytest.mark.parametrize("cls", ["none", "before", "after"])
def test_the_trie_scores_like_a_pass_for_each_label(cls: str, models: Path, examples: list[Example]) -> None:
    model = build(models, cls=cls)
    with torch.no_grad():
        scores_BK = model.score(examples)
        for row, example in enumerate(examples):
            assert close(scores_BK[row], naive(model, example))


@pytest.mark.parametrize("cls", ["none", "before", "after"])
def test_the_loss_is_the_negative_score_of_the_label(cls: str, models: Path, examples: list[Example]) -> None:
    model = build(models, cls=cls)
    with torch.no_grad():
        loss, count = model.loss(examples)
        truth = torch.tensor([model.labels.index(example.label) for example in examples])
        assert close(-loss, model.score(examples).gather(1, truth[:, None]).sum())
    assert count == sum(len(model.trie.paths[index]) for index in truth)


def test_scores_are_log_probabilities_of_strings(models: Path, examples: list[Example]) -> None:
    with torch.no_grad():
        assert build(models).score(examples).exp().sum(-1).max() < 1.0


def test_the_trie_merges_beginnings_and_keeps_prefix_labels_apart() -> None:
    eos = 9
    answers = [
        Answer((1, 2), (1, 2, eos)),
        Answer((1,), (1, eos)),
        Answer((1, 3, CLS), (1, 3, IGNORE, eos)),
    ]
    trie = label_trie(answers)
    assert trie.nodes == (1, 2, 3, CLS)
    assert trie.parents == (-1, 0, 0, 2)
    assert trie.paths == (((-1, 1), (0, 2), (1, eos)), ((-1, 1), (0, eos)), ((-1, 1), (0, 3), (3, eos)))
    assert trie.ancestors == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]


def test_padding_is_on_the_left_with_positions_that_start_at_the_text() -> None:
    embeddings_BTE, mask_BT, positions_BT = pad_left([torch.ones(2, 3), torch.full((4, 3), 2.0)])
    assert embeddings_BTE[:, :, 0].tolist() == [[0, 0, 1, 1], [2, 2, 2, 2]]
    assert mask_BT.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert positions_BT.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
