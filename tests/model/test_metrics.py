"""Metrics: equal to scikit-learn's on the same predictions, over the declared labels, overall and in parts."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from model.metrics import Record, accuracy_interval, confusion, per_label, summarise

LABELS = ("change", "neutral", "sustain", "question", "other")
ROLES = {"client": ("change", "neutral", "sustain"), "therapist": ("question", "other")}


def records(count: int = 200, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    made = []
    for place in range(count):
        role = str(rng.choice(list(ROLES)))
        label = str(rng.choice(ROLES[role]))
        said = label if rng.random() < 0.6 else str(rng.choice(LABELS))
        subset = "hard" if place % 4 == 0 else None
        made.append(Record(f"u{place}", f"c{place % 11}", role, subset, label, said, tuple(rng.random(5).tolist())))
    return made


def test_metrics_equal_scikit_learns() -> None:
    rows = records()
    truth, said = [row.label for row in rows], [row.prediction for row in rows]
    found = summarise(rows, LABELS, ROLES)
    assert found["accuracy"] == accuracy_score(truth, said)
    for name in ("macro", "weighted"):
        assert found[f"{name}_f1"] == pytest.approx(f1_score(truth, said, labels=list(LABELS), average=name))
    client = [row for row in rows if row.speaker == "client"]
    expected = f1_score(
        [row.label for row in client],
        [row.prediction for row in client],
        labels=list(ROLES["client"]),
        average="macro",
    )
    assert found["macro_f1_client"] == pytest.approx(expected)
    hard = [row for row in rows if row.subset == "hard"]
    assert found["accuracy_hard"] == pytest.approx(np.mean([row.label == row.prediction for row in hard]))
    assert confusion(rows, LABELS).sum() == len(rows)
    assert per_label(rows, LABELS)["change"]["support"] == truth.count("change")


def test_a_label_that_never_occurs_counts_in_the_macro_average() -> None:
    rows = [Record("a", "c", "client", None, "change", "change", (0.0,))] * 3
    assert summarise(rows, ("change", "neutral"), {"client": ("change", "neutral")})["macro_f1"] == 0.5


def test_the_order_of_records_changes_nothing() -> None:
    rows = records()
    shuffled = [rows[place] for place in np.random.default_rng(1).permutation(len(rows))]
    assert summarise(rows, LABELS, ROLES) == summarise(shuffled, LABELS, ROLES)
    assert accuracy_interval(rows) == accuracy_interval(shuffled)


def test_the_interval_holds_the_accuracy_and_widens_with_fewer_sessions() -> None:
    rows = records(400)
    accuracy = summarise(rows, LABELS, ROLES)["accuracy"]
    low, high = accuracy_interval(rows)
    assert low < accuracy < high
    few = [row for row in rows if row.conversation in ("c0", "c1", "c2")]
    assert np.subtract(*accuracy_interval(few)[::-1]) > high - low
    assert accuracy_interval([row for row in rows if row.conversation == "c0"]) == (0.0, 1.0)
