"""What the labels of a split can tell: whether there are several, and whether the train split has all of them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from data.corpus.schema import SPLITS

SINGLE, UNSEEN = "W_LABEL_SINGLE", "W_LABEL_UNSEEN"  # codes of findings


@dataclass(frozen=True)
class LabelProblem:
    """A reason why metrics of labels say little."""

    code: str
    where: str  # "corpus" or "val split"
    label: str
    message: str


def label_problems(counts: Mapping[str, Mapping[str, int]], items: str = "turns") -> list[LabelProblem]:
    """Return what is wrong with the labels of a corpus; nothing where it has no labels.

    Args:
        counts: number of items by split and label.
        items: what has a label.
    """
    present = {split: {label: count for label, count in counts.get(split, {}).items() if count} for split in SPLITS}
    total = sum(map(Counter, present.values()), Counter[str]())
    if len(total) == 1:
        [(label, count)] = total.items()
        message = f"all {count} labelled {items} have the label {label!r}, so there is nothing to learn or to compare"
        return [LabelProblem(SINGLE, "corpus", label, message)]
    problems = []
    for split, part in present.items():
        if len(part) == 1:
            [(label, count)] = part.items()
            what = "nothing can be learned from it" if split == "train" else "its metrics tell little about models"
            message = f"all {count} labelled {items} of the {split} split have the label {label!r}, so {what}"
            problems.append(LabelProblem(SINGLE, f"{split} split", label, message))
    for split in SPLITS[1:]:
        for label in sorted(present[split].keys() - present["train"].keys()):
            message = (
                f"{present[split][label]} {items} of the {split} split have the label {label!r}, and none of the train "
                "split, so no model can learn it"
            )
            problems.append(LabelProblem(UNSEEN, f"{split} split", label, message))
    return problems
