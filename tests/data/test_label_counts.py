"""Corpora whose labels tell little: one label, a split with one, labels that the train split lacks."""

from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig, SplitConfig
from data.corpus.label_counts import label_problems
from data.corpus.schema import Corpus
from data.loading.tasks import answer_problems
from data.preparation.build import prepare
from data.report.summary import read_findings
from data.shards.dataset import Shards
from tests.data.common import corpus

MIXED = "T:question C:change C:neutral"


def split_corpus(splits: dict[str, str]) -> Corpus:
    """Return a corpus with a session of its own dialogue in each split."""
    made = corpus(list(splits.values()))
    for conversation, split in zip(made.conversations, splits, strict=True):
        conversation.split = split
    return made


def found(shards: Shards) -> list[tuple[str, str, str]]:
    return [(finding.code, finding.where, finding.utterance) for finding in read_findings(shards)]


def test_labels_that_tell_something_are_no_problem() -> None:
    counts = {"change": 2, "neutral": 1}
    assert label_problems({"train": counts, "val": counts, "test": {"change": 1, "neutral": 1}}) == []
    assert label_problems({"train": {}, "val": {}, "test": {}}) == []


def test_corpus_with_one_label_is_one_finding(tmp_path: Path) -> None:
    shards = prepare(corpus(["C:change T C:change"] * 6), tmp_path / "shards")
    assert found(shards) == [("W_LABEL_SINGLE", "corpus", "change")]
    assert "all 12 labelled turns have the label 'change'" in read_findings(shards)[0].message
    assert answer_problems(shards, ["classify", "response"]) == [
        "classify: all 12 labelled items have the label 'change', so there is nothing to learn or to compare"
    ]


def test_labels_of_held_out_splits_are_findings(tmp_path: Path) -> None:
    made = split_corpus({"train": "C:change T:question", "val": "C:neutral C:neutral", "test": MIXED})
    shards = prepare(made, tmp_path / "shards")
    assert found(shards) == [
        ("W_LABEL_SINGLE", "val split", "neutral"),
        ("W_LABEL_UNSEEN", "val split", "neutral"),
        ("W_LABEL_UNSEEN", "test split", "neutral"),
    ]
    assert [problem.partition(":")[0] for problem in answer_problems(shards, ["classify", "client_talk"])] == [
        *["classify"] * 3,
        *["client_talk"] * 4,  # of the client, the train split has one label as well
    ]


def test_findings_of_folds_name_the_folds(tmp_path: Path) -> None:
    dialogues = [MIXED] * 5 + ["T:reflection C:change C:neutral"]
    settings = CorpusConfig(split=SplitConfig(folds=3, stratify=()))
    shards = prepare(corpus(dialogues), tmp_path / "shards", settings)
    [row] = [row for row, label in enumerate(shards.columns["label"]) if label == "reflection"]
    fold = shards.columns["fold"][row]
    messages = {finding.where: finding.message for finding in read_findings(shards)}
    assert messages.keys() == {"val split", "test split"}
    assert messages["test split"].endswith(f"(with data.fold {fold})")
    assert messages["val split"].endswith(f"(with data.fold {(fold - 1) % 3})")
    for test in range(3):
        held_out = any(shards_of == "reflection" for shards_of in labels_held_out(shards, test))
        assert bool(answer_problems(Shards(shards.folder, test), ["classify"])) == held_out


def labels_held_out(shards: Shards, fold: int) -> set[str]:
    """Return the labels that only the val and test splits have, given the test fold."""
    columns = Shards(shards.folder, fold).columns
    rows = list(zip(columns["split"], columns["label"], strict=True))
    return {label for split, label in rows if split != "train"} - {label for split, label in rows if split == "train"}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_split_with_one_label_is_named(split: str) -> None:
    both = {"change": 3, "neutral": 3}
    counts = {"train": both, "val": both, "test": both, split: {"change": 2}}
    assert f"all 2 labelled turns of the {split} split" in label_problems(counts)[0].message
