"""The votes of several annotators of a turn: the labels that they agree on, and the share of each answer.

Votes map what an annotator gave, one label or several that are joined with JOIN, to the number of annotators.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from data.corpus.schema import JOIN, split_label

Votes = Mapping[str, int]


def label_order(labels: Iterable[str]) -> dict[str, int]:
    """Return the position of each label, by which ties are decided."""
    return {label: index for index, label in enumerate(dict.fromkeys(labels))}


def count_votes(ballots: Iterable[Sequence[str]], order: Mapping[str, int]) -> dict[str, int]:
    """Return the votes of annotators, most frequent first; labels of an annotator are joined in the given order.

    Args:
        ballots: the labels that each annotator gave.
        order: see `label_order`; other labels come last, by name.
    """

    def position(label: str) -> tuple[int, str]:
        return order.get(label, len(order)), label

    votes = Counter(JOIN.join(sorted(set(ballot), key=position)) for ballot in ballots)
    ranked = sorted(votes, key=lambda given: (-votes[given], [position(label) for label in split_label(given)]))
    return {given: votes[given] for given in ranked}


def majority(votes: Votes, order: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Return the labels that more than half of the annotators gave, or else the most frequent one.

    Args:
        votes: of one annotator at least.
        order: see `label_order`; the first of equally frequent labels is taken.

    Returns:
        The labels, most frequent first, and those among which the order decided; none if there was a majority.
    """
    counts = Counter[str]()
    for given, annotators in votes.items():
        for label in split_label(given):
            counts[label] += annotators
    ranked = sorted(counts, key=lambda label: (-counts[label], order.get(label, len(order)), label))
    chosen = [label for label in ranked if counts[label] > sum(votes.values()) / 2]
    tied = [label for label in ranked if counts[label] == counts[ranked[0]]]
    return chosen or ranked[:1], tied if not chosen and len(tied) > 1 else []


def vote_shares(votes: Votes, answers: Collection[str], allowed: Collection[str]) -> dict[str, float]:
    """Return the share of each answer among the votes, which sum to 1; empty if no vote counts.

    Labels that an annotator gave together, and that are no answer of the task together, count in equal parts. A vote
    for a label that is not allowed does not count.

    Args:
        votes: of one turn.
        answers: that the task knows, single labels and joined ones.
        allowed: the labels that the role of the turn may have.
    """
    shares: dict[str, float] = {}
    for given, annotators in votes.items():
        labels = split_label(given)
        if not annotators or any(label not in allowed or label not in answers for label in labels):
            continue
        for answer in (given,) if given in answers else labels:
            shares[answer] = shares.get(answer, 0.0) + annotators / (1 if answer == given else len(labels))
    total = sum(shares.values())
    return {answer: share / total for answer, share in shares.items()}


def counts_labels(label: str, votes: Votes) -> bool:
    """Return whether the votes are those of single labels although annotators gave several, as in older corpora.

    Where a turn has several labels by majority, one annotator at least gave two of them together.
    """
    return JOIN in label and bool(votes) and not any(JOIN in given for given in votes)
