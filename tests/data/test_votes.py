"""The votes of annotators: the majority, the shares of answers, and votes that do not count."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

from data.corpus.votes import (
    ALPHA,
    KAPPA,
    AgreementSums,
    Judgement,
    count_votes,
    counts_labels,
    judgements,
    label_order,
    majority,
    vote_shares,
)
from data.preparation.build import prepare
from tests.data.common import corpus

ORDER = label_order(["b", "a", "c"])


def test_votes_tell_which_labels_are_given_together() -> None:
    assert count_votes([("a", "b"), ("b", "a"), ("c",), ("z",), ("c",)], ORDER) == {"b|a": 2, "c": 2, "z": 1}
    assert list(count_votes([("a",), ("z",), ("b",), ("y",)], ORDER)) == ["b", "a", "y", "z"]


@pytest.mark.parametrize(
    ("votes", "labels", "tied"),
    [
        ({"a": 2, "b": 1}, ["a"], []),
        ({"a": 1, "b": 1, "c": 1}, ["b"], ["b", "a", "c"]),
        ({"a": 2, "b": 1, "c": 1}, ["a"], []),  # half is no majority, but the most
        ({"b|a": 2, "b|c": 1}, ["b", "a"], []),
        ({"b|a": 1, "c": 1}, ["b"], ["b", "a", "c"]),
    ],
)
def test_majority_of_labels(votes: dict[str, int], labels: list[str], tied: list[str]) -> None:
    assert majority(votes, ORDER) == (labels, tied)


def test_shares_sum_to_one_over_the_answers() -> None:
    votes = {"a": 2, "b|a": 4, "c|a": 2, "x": 7, "x|a": 1}
    assert vote_shares(votes, ["a", "b", "c", "b|a"], ["a", "b", "c"]) == {"a": 3 / 8, "b|a": 4 / 8, "c": 1 / 8}
    assert vote_shares({"x": 2}, ["a"], ["a"]) == vote_shares({}, ["a"], ["a"]) == {}


def test_older_votes_count_labels_instead_of_annotators() -> None:
    assert counts_labels("a|b", {"a": 3, "b": 2})
    assert not any([counts_labels("a|b", {"a|b": 2, "c": 1}), counts_labels("a", {"a": 3}), counts_labels("a|b", {})])


def test_votes_for_labels_of_another_role_are_flagged(tmp_path: Path) -> None:
    spoken = corpus(["C:change! T:question!"] * 6)
    first, second = spoken.conversations[0].turns
    first.votes = {"change": 2, "question": 1, "chnge": 1}
    second.votes = {"question": 2, "reflection|other": 1}
    shards = prepare(spoken, tmp_path / "shards")
    found = [finding for finding in spoken.findings if finding.code == "W_LABEL_VOTE"]
    assert [(finding.utterance, finding.message) for finding in found] == [
        (first.id, "2 of 4 annotators gave chnge, question, which no client turn has")
    ]
    votes = dict(zip(shards.columns["id"], shards.columns["votes"], strict=True))
    assert dict(votes[first.id]) == {"change": 2, "question": 1, "chnge": 1}
    assert dict(votes[second.id]) == {"question": 2, "other|reflection": 1}


def test_each_annotator_is_compared_with_the_others() -> None:
    """Without oneself the majority may be another label, or a tie that the order decides."""
    assert judgements("s", {"a": 2, "b": 1}, ORDER) == [Judgement("s", "a", "b", 0.5)] * 2 + [Judgement("s", "b", "a")]
    assert judgements("s", {"a|c": 2, "b": 1}, ORDER)[2] == Judgement("s", "b", "a|c")
    assert judgements("s", {"c": 1}, ORDER) == []


def test_figures_of_a_table_by_hand() -> None:
    """Two turns of three annotators: a a b, and b b b.

    The annotators of the first turn meet a tie, which `b` wins, twice, and a majority of `a` once: none is right. All
    of the second turn are: accuracy 3/6. The labels of others are b b a b b b. Kappa: chance is 2/6 x 1/6 + 4/6 x 5/6 =
    22/36. F1: a has no hit; b has 3 hits among 4 given and 5 true, 6/9. Pairs agree with 1/3 and 1, and chance is
    (2/6)^2 + (4/6)^2 = 5/9. Alpha: observed disagreement 1/3, expected 2 x 2 x 4 / (6 x 5) = 8/15.
    """
    compared = [*judgements("s", {"a": 2, "b": 1}, ORDER), *judgements("t", {"b": 3}, ORDER)]
    sums = AgreementSums.of(compared)
    totals = sums.rows(compared).sum(0)
    found = {name: float(value(totals)) for name, value in sums.figures(equal=True).items()}
    assert found == pytest.approx(
        {"accuracy": 3 / 6, "macro_f1": 1 / 3, "kappa": (1 / 2 - 11 / 18) / (7 / 18), KAPPA: (2 / 3 - 5 / 9) / (4 / 9)}
    )
    assert float(sums.figures(equal=False)[ALPHA](totals)) == pytest.approx(1 - (1 / 3) / (8 / 15))


def test_figures_equal_those_of_libraries() -> None:
    """scikit-learn's, and nltk's alpha, for turns with two to six annotators, and for resampled sums."""
    from nltk.metrics.agreement import AnnotationTask

    rng = np.random.default_rng(0)
    turns = [
        {"abc"[label]: int(count) for label, count in enumerate(rng.multinomial(2 + turn % 5, chances)) if count}
        for turn, chances in enumerate(rng.dirichlet([0.6, 0.5, 0.3], 60))
    ]
    compared = [one for votes in turns for one in judgements("s", votes, ORDER)]
    sums = AgreementSums.of(compared)
    rows_IN = sums.rows(compared)
    rated = [
        (annotator, turn, label)
        for turn, votes in enumerate(turns)
        for annotator, label in enumerate(label for label, count in votes.items() for _ in range(count))
    ]
    alpha = sums.krippendorff_alpha(rows_IN.sum(0))
    assert alpha == pytest.approx(AnnotationTask(data=rated).alpha(), abs=1e-9)
    assert 0.05 < alpha < 0.95
    drawn_RI = rng.integers(len(compared), size=(3, len(compared)))
    sums_RN = rows_IN[drawn_RI].sum(1)
    for index, drawn in enumerate(drawn_RI):
        true, given = ([compared[item][place] for item in drawn] for place in (2, 1))
        assert sums.accuracy(sums_RN)[index] == pytest.approx(accuracy_score(true, given))
        assert sums.macro_f1(sums_RN)[index] == pytest.approx(f1_score(true, given, average="macro"))
        assert sums.cohen_kappa(sums_RN)[index] == pytest.approx(cohen_kappa_score(true, given))


def test_kappa_is_undefined_if_all_answers_are_equal() -> None:
    compared = judgements("s", {"a": 4}, ORDER)
    sums = AgreementSums.of(compared)
    totals = sums.rows(compared).sum(0)
    assert sums.accuracy(totals) == sums.macro_f1(totals) == 1
    assert all(np.isnan(value(totals)) for value in (sums.cohen_kappa, sums.fleiss_kappa, sums.krippendorff_alpha))
