"""The votes of several annotators of a turn: the labels that they agree on, the share of each answer, and how far they
agree, which is the ceiling of a model.

Votes map what an annotator gave, one label or several that are joined with JOIN, to the number of annotators.

Shapes: I judgements, N sums of a table of judgements, A answers, L single labels.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.corpus.schema import JOIN, split_label

Votes = Mapping[str, int]
KAPPA, ALPHA = "Fleiss' kappa", "Krippendorff's alpha"


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


class Judgement(NamedTuple):
    """What one annotator (or a model) gave to a turn, and the reference that it is compared with."""

    session: str
    given: str
    reference: str  # the label that the majority of the other annotators gave
    agreeing: float = 0.0  # share of the other annotators who gave the same


def judgements(session: str, votes: Votes, order: Mapping[str, int]) -> list[Judgement]:
    """Compare each annotator of a turn with the others; ties among these are decided as in the corpus.

    Args:
        session: of the turn.
        votes: of two annotators at least.
        order: see `label_order`.
    """
    compared, total = list[Judgement](), sum(votes.values())
    for given, annotators in votes.items():
        others = {answer: count - (answer == given) for answer, count in votes.items() if count > (answer == given)}
        if annotators and others:
            chosen = sorted(majority(others, order)[0], key=lambda label: (order.get(label, len(order)), label))
            one = Judgement(session, given, JOIN.join(chosen), (annotators - 1) / (total - 1))
            compared += [one] * annotators
    return compared


@dataclass(frozen=True)
class AgreementSums:
    """Sums over judgements, of which every figure of agreement is a function; so resampled sessions need no others.

    scikit-learn has the same figures for one sample; the tests compare them.
    """

    answers: tuple[str, ...]
    labels: tuple[str, ...]  # the single labels among the answers

    @classmethod
    def of(cls, compared: Iterable[Judgement]) -> "AgreementSums":
        """Return the sums for the answers that occur."""
        answers = {answer for one in compared for answer in (one.given, one.reference)}
        return cls(tuple(sorted(answers)), tuple(sorted({label for one in answers for label in split_label(one)})))

    def rows(self, compared: Sequence[Judgement]) -> np.ndarray:
        """Return sums_IN: 1, right, agreeing, given and reference by answer, and hits, given, reference by label."""
        sides = [[one.given for one in compared], [one.reference for one in compared]]
        given_IA, true_IA = (
            np.array([[answer == text for answer in self.answers] for text in side], float) for side in sides
        )
        given_IL, true_IL = (
            np.array([[label in split_label(text) for label in self.labels] for text in side], float) for side in sides
        )
        first = [(1.0, one.given == one.reference, one.agreeing) for one in compared]
        return np.concatenate([first, given_IA, true_IA, given_IL * true_IL, given_IL, true_IL], axis=1)

    def _parts(self, sums: np.ndarray) -> list[np.ndarray]:
        answers, labels = len(self.answers), len(self.labels)
        borders = np.cumsum([3, answers, answers, labels, labels])
        head, *rest = np.split(sums, borders, axis=-1)
        return [*np.moveaxis(head, -1, 0), *rest]

    def accuracy(self, sums: np.ndarray) -> np.ndarray:
        """Return the share of judgements that equal the reference."""
        count, right, *_ = self._parts(sums)
        return _divided(right, count)

    def macro_f1(self, sums: np.ndarray) -> np.ndarray:
        """Return the F1 averaged over the labels that occur."""
        *_, hits_L, given_L, true_L = self._parts(sums)
        f1_L = np.divide(2 * hits_L, given_L + true_L, out=np.zeros_like(hits_L), where=given_L + true_L > 0)
        average: np.ndarray = f1_L.mean(-1)
        return average

    def cohen_kappa(self, sums: np.ndarray) -> np.ndarray:
        """Return kappa = (p - e) / (1 - e); p is the accuracy, and e that of chance (Cohen, 1960)."""
        count, right, _, given_A, true_A, *_ = self._parts(sums)
        chance = _divided((given_A * true_A).sum(-1), count**2)
        return _divided(_divided(right, count) - chance, 1 - chance)

    def fleiss_kappa(self, sums: np.ndarray) -> np.ndarray:
        """Return kappa = (p - e) / (1 - e) of two annotators of a turn (Fleiss, 1971); turns have equally many."""
        count, _, agreeing, given_A, *_ = self._parts(sums)
        chance = _divided((given_A**2).sum(-1), count**2)
        return _divided(_divided(agreeing, count) - chance, 1 - chance)

    def krippendorff_alpha(self, sums: np.ndarray) -> np.ndarray:
        """Return alpha = 1 - observed / expected disagreement (Krippendorff, 2011), for any number of annotators."""
        count, _, agreeing, given_A, *_ = self._parts(sums)
        expected = 1 - _divided((given_A * (given_A - 1)).sum(-1), count * (count - 1))
        return 1 - _divided(1 - _divided(agreeing, count), expected)

    def figures(self, equal: bool) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """Return the figures of annotators by name.

        Args:
            equal: whether all turns have equally many annotators.
        """
        agreement = (KAPPA, self.fleiss_kappa) if equal else (ALPHA, self.krippendorff_alpha)
        return {**self.against_reference(), agreement[0]: agreement[1]}

    def against_reference(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """Return the figures of one judge per turn by name, each a function [..., N] → [...]."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "kappa": self.cohen_kappa}


def _divided(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole; nan where the whole is 0, as for a kappa if all answers are equal."""
    quotient: np.ndarray = np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 1e-12)
    return quotient
