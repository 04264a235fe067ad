"""The votes of annotators: the majority, the shares of answers, and votes that do not count."""

from pathlib import Path

import pytest

from data.corpus.votes import count_votes, counts_labels, label_order, majority, vote_shares
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
