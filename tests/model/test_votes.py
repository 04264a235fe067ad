"""Training on the votes of annotators: the loss, what it is equal to, class weights, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.config import DataConfig, TaskWeights
from data.errors import MisfitError
from data.loading.examples import Example
from data.loading.tasks import answer_sets, check_votes, vote_targets
from data.shards.dataset import Shards
from model.config import LossConfig, TrainConfig
from model.evaluation.scoring import label_scores
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import weigh_targets
from model.objectives.losses import Share, answer_losses
from model.speech_llm.speech_llm import SpeechLLM
from tests.conftest import LABELS
from tests.model.common import build, close, soft_targets, voted
from tests.model.losses import ALL, student_rows
from tests.model.trials import DROPOUT, ONE, KilledError, Trial, history, kill_after, same_end

ONLY = LossConfig()
VOTES = TrainConfig(epochs=2, batch_size=5, learning_rate=3e-3, checkpoint_steps=3, labels="votes")


@pytest.mark.parametrize("changed", [{}, {"cls": "after"}, {"modality": "text", "cls": "none"}])
def test_vote_loss_equals_single_labels_in_float64(
    changed: dict[str, str], models: Path, examples: list[Example]
) -> None:
    """The loss and its gradient, with and without class weights; each label is computed alone, without padding."""
    model, targets = build(models, **changed), soft_targets(examples)
    losses = answer_losses(model, examples, ONLY, targets)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number, computed_B in enumerate([losses.next_token_B, losses.weighted_sum(ONLY)]):
        naive = []
        for example, target in zip(examples, targets, strict=True):
            total = torch.zeros((), dtype=torch.float64)
            for label, share in (target or {example.answer: Share(1.0, 1.0)}).items():
                logits, _, tokens = student_rows(model, replace(example, answer=label))
                log_probs = logits.double().log_softmax(-1)
                total = total - share[number] * log_probs[torch.arange(len(tokens)), tokens].sum()
            naive.append(total)
        assert close(computed_B.double(), torch.stack(naive), 1e-5)
        weights = torch.linspace(1.0, 2.0, len(examples))
        found, wanted = (
            torch.autograd.grad((loss_B * weights).sum(), parameters, allow_unused=True, retain_graph=True)
            for loss_B in (computed_B, torch.stack(naive))
        )
        largest = max(float(gradient.abs().max()) for gradient in wanted if gradient is not None)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert float((one - other).abs().max()) <= 1e-5 * largest


@torch.no_grad()
def test_vote_loss_is_a_cross_entropy_over_the_trie(models: Path, examples: list[Example]) -> None:
    """That of the softmax over the labels, plus what the model gives to texts that are no label."""
    model, targets = build(models), soft_targets(examples)
    scores_BK = label_scores(model, examples)
    loss_B = answer_losses(model, examples, ONLY, targets).next_token_B
    for example, scores_K, loss, target in zip(examples, scores_BK, loss_B, targets, strict=True):
        shares = target or {example.answer: Share(1.0, 1.0)}
        shares_K = torch.tensor([shares[label].share if label in shares else 0.0 for label in LABELS])
        expected = F.cross_entropy(scores_K, shares_K) - scores_K.logsumexp(0)
        assert close(loss, expected, 1e-5)


@torch.no_grad()
def test_votes_leave_other_losses_and_counts_alone(models: Path, examples: list[Example]) -> None:
    """Distillation, hidden states and divisors belong to the label of the majority."""
    model = build(models)
    soft, hard = (answer_losses(model, examples, ALL, targets) for targets in (soft_targets(examples), None))
    assert soft.count_B == hard.count_B
    assert soft.distillation_B is not None
    assert hard.distillation_B is not None
    assert close(soft.distillation_B, hard.distillation_B, 1e-5)
    assert soft.hidden_B is not None
    assert hard.hidden_B is not None
    assert close(soft.hidden_B, hard.hidden_B, 1e-5)
    assert not close(soft.next_token_B, hard.next_token_B, 1e-2)
    assert hard.weighted_next_token_B is None


def test_unanimous_votes_train_the_same_model_to_the_bit(models: Path, tmp_path: Path) -> None:
    """As do turns of a single annotator."""
    shards = voted(
        tmp_path / "shards", lambda number, turn: {turn.label: 10} if number % 2 and turn.label is not None else {}
    )
    for labels in ("majority", "votes"):
        trial = Trial(train=VOTES.model_copy(update={"labels": labels}))
        trial.run(models, shards, tmp_path / labels)
    assert history(tmp_path / "majority") == history(tmp_path / "votes")


def test_disputed_votes_train_another_model(models: Path, disputed: Shards, tmp_path: Path) -> None:
    for labels in ("majority", "votes"):
        Trial(train=VOTES.model_copy(update={"labels": labels})).run(models, disputed, tmp_path / labels)
    majority, votes = (history(tmp_path / labels)[-1][1] for labels in ("majority", "votes"))
    assert votes["loss"] != majority["loss"]
    assert votes["steps"] == majority["steps"]


def test_training_on_votes_resumes_to_the_bit(
    models: Path, disputed: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(train=VOTES, model={"lora": DROPOUT})
    trial.run(models, disputed, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, 4)
        trial.run(models, disputed, tmp_path / "killed")
    trial.run(models, disputed, tmp_path / "killed")
    assert same_end(tmp_path / "whole", tmp_path / "killed")


def test_each_task_with_codes_gets_the_votes(models: Path, disputed: Shards) -> None:
    tasks = TaskWeights(classify=1, forecast=1, response=1, quality=1)
    trial = Trial(tasks=tasks, train=VOTES)
    model, data = trial.start(models, disputed)
    split, columns = data.splits["train"], disputed.columns
    soft = 0
    for (task, row), target in zip(split.items, split.targets, strict=True):
        votes = dict(columns["votes"][row] or ())
        if task in ("classify", "forecast") and len(votes) > 1:
            assert target == {label: count / 10 for label, count in votes.items()}
            soft += task == "forecast"
        else:
            assert target is None
    assert soft > 3
    assert not any(data.splits["val"].targets)
    plain = TrialData.open(disputed, model, trial.data, ("train",))
    assert not any(plain.splits["train"].targets)
    longer = [one.tokens - other.tokens for one, other in zip(split.costs, plain.splits["train"].costs, strict=True)]
    assert [extra > 0 for extra in longer] == [target is not None for target in split.targets]
    assert split.predicted == plain.splits["train"].predicted


def test_class_weights_count_for_each_voted_label() -> None:
    """As torch weights a cross-entropy with probabilities."""
    three = [("classify", 0), ("classify", 1), ("response", 2)]
    numbers = {"classify": {"change": 3.0, "sustain": 0.5}}
    votes = [{"change": 0.75, "neutral": 0.25}, None, None]
    weights, targets = weigh_targets(numbers, three, ["change", "sustain", "so"], votes)
    assert weights == [2.5, 0.5, 1.0]
    assert targets == [{"change": Share(0.75, 0.9), "neutral": Share(0.25, 0.1)}, None, None]
    logits_BK = torch.tensor([[0.3, -1.0, 2.0]])
    by_torch = F.cross_entropy(
        logits_BK, torch.tensor([[0.75, 0.0, 0.25]]), weight=torch.tensor([3.0, 0.5, 1.0]), reduction="sum"
    )
    nll_K = -logits_BK.log_softmax(-1)[0]
    assert weights[0] * (0.9 * nll_K[0] + 0.1 * nll_K[2]) == pytest.approx(float(by_torch))
    assert weigh_targets("equal", three, ["change", "sustain", "so"], votes)[0] == [1.0, 1.0, 1.0]


def test_corpus_without_votes_is_refused_with_counts(models: Path, corpus: Shards, tmp_path: Path) -> None:
    model = SpeechLLM(Trial().config(models), answer_sets(corpus, ONE.active()), "meta")
    with pytest.raises(MisfitError) as error:
        TrialData.open(corpus, model, DataConfig(), ("train", "val"), votes=True)
    training = len(TrialData.open(corpus, model, DataConfig(), ("train",)).splits["train"].items)
    expected = f"none of the {training} training items of classify is one (the corpus has 0)"
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    other = {row for row, split in enumerate(corpus.columns["split"]) if split != "train"}
    ids = {corpus.columns["id"][row] for row in other if corpus.columns["label"][row]}
    outside = voted(tmp_path / "shards", lambda _, turn: {"change": 2, "neutral": 1} if turn.id in ids else {})
    with pytest.raises(MisfitError, match=rf"is one \(the corpus has {len(ids)}\)"):
        check_votes(outside, ["classify"])


def test_votes_of_an_older_corpus_may_be_ambiguous(tmp_path: Path) -> None:
    """They counted labels where an annotator gave several, so the shares cannot be known."""
    made = voted(tmp_path / "shards", lambda _, turn: {"change": 3, "sustain": 2})
    row = next(
        row for row, split in enumerate(made.columns["split"]) if split == "train" and made.columns["label"][row]
    )
    check_votes(made, ["classify"])
    made.columns["label"][row] = "change|sustain"
    with pytest.raises(MisfitError, match="do not tell which labels an annotator gave together"):
        check_votes(made, ["classify"])


def test_target_of_votes_stays_within_the_labels_of_the_task(disputed: Shards) -> None:
    """Labels that are given together are an answer, or count in equal parts; others do not count."""
    [(row, label)] = [(row, label) for row, label in enumerate(disputed.columns["label"]) if label][:1]
    before = disputed.columns["votes"][row]
    cases: list[tuple[dict[str, int], dict[str, float] | None]] = [
        ({"change": 1, "sustain": 3}, {"change": 0.25, "sustain": 0.75}),
        ({"change|sustain": 2, "change": 2}, {"change|sustain": 0.5, "change": 0.5}),
        ({"change|neutral": 2, "change": 2}, {"change": 0.75, "neutral": 0.25}),
        ({"change": 2, "question": 5, "neutral": 2}, {"change": 0.5, "neutral": 0.5}),
        ({"question": 5}, None),
        ({label: 9}, None),
        ({"sustain": 1}, None),
    ]
    try:
        for votes, expected in cases:
            disputed.columns["votes"][row] = list(votes.items())
            found = vote_targets(disputed, [("classify", row)], (*LABELS, "change|sustain"))
            assert found == [expected], votes
    finally:
        disputed.columns["votes"][row] = before
