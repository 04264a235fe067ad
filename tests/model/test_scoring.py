"""Scores equal those of a plain pass for each label, and replies those of a loop without a cache.

Every reference computes one unpadded example.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from data.errors import ConfigError
from data.loading.examples import Example
from data.loading.tasks import AnswerSet
from model.config import LossConfig
from model.evaluation.evaluator import predict
from model.evaluation.scoring import Reply, decide, generate, label_scores
from model.objectives.losses import answer_losses
from model.speech_llm.label_trie import label_trie
from model.speech_llm.prompt import CLS, IGNORE, Answer
from model.speech_llm.speech_llm import SpeechLLM, pad_left
from tests.conftest import LABELS
from tests.model.common import ANSWERS, build, close, replies, settings

SETS = AnswerSet((*LABELS, "change|neutral", "change|sustain"), (5, 3, 2, 1, 0))


def next_logits(model: SpeechLLM, prompt_TE: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Logits after the prompt and each further token, from one pass without cache or mask."""
    sequence = torch.cat([prompt_TE, model.embed(tokens)]) if tokens else prompt_TE
    logits: torch.Tensor = model.llm(inputs_embeds=sequence[None], use_cache=False).logits[0, len(prompt_TE) - 1 :]
    return logits


def naive_score(model: SpeechLLM, example: Example, answer: Answer) -> torch.Tensor:
    (prompt,) = model.prompts([example])
    logp = next_logits(model, prompt, list(answer.inputs)).log_softmax(-1)
    return torch.stack([logp[index, token] for index, token in enumerate(answer.targets) if token != IGNORE]).sum()


@pytest.mark.parametrize(
    ("cls", "task"), [("none", "classify"), ("before", "classify"), ("before", "forecast"), ("after", "classify")]
)
@torch.no_grad()
def test_trie_scores_like_a_pass_for_each_label(cls: str, task: str, models: Path, examples: list[Example]) -> None:
    """Scores are log-probabilities of texts, and the loss is the negative score of the label."""
    answers = ANSWERS["classify"] if cls == "after" else SETS
    model = SpeechLLM(settings(models, cls=cls), {"classify": answers, "forecast": AnswerSet(LABELS, (5, 3, 2))})
    asked = [replace(example, task=task) for example in examples]
    scores_BK = label_scores(model.eval(), asked)
    assert scores_BK.shape == (8, len(model.tasks[task].labels))
    assert scores_BK.exp().sum(-1).max() < 1.0
    for row, example in enumerate(asked[:3]):
        expected = [naive_score(model, example, answer) for answer in model.answers[task].values()]
        assert close(scores_BK[row], torch.stack(expected))
    losses = answer_losses(model, asked, LossConfig())
    truth = torch.tensor([LABELS.index(example.answer) for example in asked])
    assert close(-losses.next_token_B, scores_BK.gather(1, truth[:, None])[:, 0])
    assert losses.count_B == [len(model.tries[task].paths[index]) for index in truth]


@torch.no_grad()
def test_balanced_priors_divide_scores_by_training_shares(models: Path, examples: list[Example]) -> None:
    """The loss stays the same, and a label that training lacks has a share."""
    plain, balanced = build(models), build(models, priors="balanced")
    scores_BK = label_scores(plain, examples)
    assert torch.equal(label_scores(balanced, examples), scores_BK)
    assert decide(plain, "classify", scores_BK) is scores_BK
    shares = torch.tensor([6, 4, 3]) / 13  # of the counts 5, 3, 2 and one of each
    assert close(decide(balanced, "classify", scores_BK), scores_BK - shares.log())
    for first, second in zip(predict(plain, examples)(), predict(balanced, examples)(), strict=True):
        assert first.loss == second.loss
        assert second.scores == pytest.approx([a - b for a, b in zip(first.scores, shares.log().tolist(), strict=True)])
        assert second.prediction == LABELS[max(range(3), key=second.scores.__getitem__)]
    balanced.tasks["classify"] = AnswerSet(LABELS, (0, 10**9, 10**9))
    records = predict(balanced, examples)()
    assert {record.prediction for record in records} == {"change"}
    assert torch.tensor([record.scores for record in records]).isfinite().all()


@torch.no_grad()
def test_label_set_that_training_lacks_is_wrong_but_has_a_loss(models: Path, examples: list[Example]) -> None:
    model = build(models)
    odd = replace(examples[0], answer="sustain+neutral")
    first, second = predict(model, [odd, examples[1]])()
    assert first.prediction in LABELS
    assert first.loss == pytest.approx(-naive_score(model, odd, model.answer(odd)).item(), rel=1e-5)
    assert first.tokens == model.answer(odd).predicted
    assert second.loss == pytest.approx(predict(model, [examples[1]])()[0].loss, rel=1e-5)


def naive_reply(model: SpeechLLM, example: Example, limit: int, eos: int) -> tuple[list[int], bool]:
    """Return a greedy reply, computed from the start for each token."""
    (prompt,) = model.prompts([example])
    tokens: list[int] = []
    while len(tokens) < limit:
        token = int(next_logits(model, prompt, tokens)[-1].argmax())
        if token == eos:
            return tokens, True
        tokens.append(token)
    return tokens, False


def expected_replies(model: SpeechLLM, examples: list[Example]) -> list[Reply]:
    tokenizer, limit = model.prompt_builder.tokenizer.hf, model.config.max_new_tokens
    generated = [naive_reply(model, example, limit, tokenizer.eos_token_id) for example in examples]
    return [Reply(tokenizer.decode(tokens, skip_special_tokens=True).strip(), ended) for tokens, ended in generated]


@pytest.fixture(scope="module")
def stopping(models: Path, tmp_path_factory: pytest.TempPathFactory, examples: list[Example]) -> Path:
    """The LLM with another EOS: a token in the middle of one reply that is not in all of them."""
    model, asked = build(models), replies(examples)
    with torch.no_grad():
        references = [naive_reply(model, example, 6, -1)[0] for example in asked]
    middle = {token for tokens in references for token in tokens[1:-1] if token not in tokens[:1]}
    eos = next(token for token in sorted(middle) if not all(token in tokens for tokens in references))
    folder = tmp_path_factory.mktemp("llm") / "stopping"
    shutil.copytree(models / "llm", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    assert tokenizer.eos_token_id == eos
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("modality", ["text", "text+speech"])
@torch.no_grad()
def test_replies_are_greedy_and_stop_at_eos(
    modality: str, models: Path, stopping: Path, examples: list[Example]
) -> None:
    """They do not depend on the batch."""
    model, asked = build(models, modality=modality, llm={"path": str(stopping)}), replies(examples)
    generated = generate(model, asked)
    assert generated == expected_replies(model, asked)
    assert len({reply.text for reply in generated}) > 1
    assert modality == "text" or {reply.ended for reply in generated} == {True, False}
    records = predict(model, asked)()
    assert [(record.prediction, record.ended) for record in records] == [
        (reply.text, reply.ended) for reply in generated
    ]
    assert [generate(model, [example])[0] for example in asked] == generated
    assert generate(model, asked[::-1]) == generated[::-1]


@torch.no_grad()
def test_eos_as_the_last_allowed_token_ends_a_reply(models: Path, stopping: Path, examples: list[Example]) -> None:
    whole, asked = build(models, llm={"path": str(stopping)}), replies(examples)
    eos = whole.prompt_builder.tokenizer.hf.eos_token_id
    references = [naive_reply(whole, example, 6, eos) for example in asked]
    index = next(index for index, (_, ended) in enumerate(references) if ended)
    length = len(references[index][0])
    for limit, ended in ((length + 1, True), (length, False)):
        model = build(models, llm={"path": str(stopping)}, max_new_tokens=limit)
        (reply,) = generate(model, [asked[index]])
        assert reply.ended is ended


SAMPLING = {"do_sample": True, "temperature": 5.0, "top_k": 0}
LIMITS = {"min_new_tokens": 6, "max_length": 3, "no_repeat_ngram_size": 1, "prompt_lookup_num_tokens": 3}
PENALTIES = {"repetition_penalty": 3.0, "encoder_repetition_penalty": 3.0, "exponential_decay_length_penalty": [1, 9.0]}


@pytest.mark.parametrize(
    "changed",
    [
        SAMPLING,
        {"num_beams": 3, "length_penalty": 4.0},
        *({name: value} for name, value in (PENALTIES | LIMITS).items()),  # one by one: together they might cancel
        {"suppress_tokens": list(range(3, 200)), "begin_suppress_tokens": list(range(3, 200))},
        {"bad_words_ids": [[token] for token in range(3, 200)], "sequence_bias": [[[9], 50.0]]},
        {"forced_bos_token_id": 7, "forced_eos_token_id": 8},
        {"eos_token_id": list(range(3, 200))},
    ],
    ids=lambda changed: next(iter(changed)),
)
@torch.no_grad()
def test_generation_config_of_the_folder_changes_nothing(
    changed: dict[str, Any], models: Path, tmp_path: Path, stopping: Path, examples: list[Example]
) -> None:
    asked = replies(examples[:3])
    expected = generate(build(models, llm={"path": str(stopping)}), asked)
    folder = tmp_path / "own"
    shutil.copytree(stopping, folder)
    (folder / "generation_config.json").write_text(json.dumps(changed))
    assert generate(build(models, llm={"path": str(folder)}), asked) == expected


def test_trie_merges_beginnings_and_separates_prefixes() -> None:
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


def test_padding_is_on_the_left_and_positions_start_at_the_text() -> None:
    embeddings_BTE, mask_BT, positions_BT = pad_left([torch.ones(2, 3), torch.full((4, 3), 2.0)])
    assert embeddings_BTE[:, :, 0].tolist() == [[0, 0, 1, 1], [2, 2, 2, 2]]
    assert mask_BT.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert positions_BT.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_cls_after_labels_with_a_shared_beginning_is_refused(models: Path) -> None:
    """Nothing is predicted where the shorter one ends, so it would always win."""
    with pytest.raises(ConfigError, match=r"model\.cls: after cannot distinguish 'change' from 'change\|neutral'"):
        SpeechLLM(settings(models, cls="after"), {"classify": SETS})
    SpeechLLM(settings(models, cls="before"), {"classify": SETS})
