"""Metrics equal those of scikit-learn, sacrebleu and rouge-score, or a slow explicit computation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from model.evaluation.metrics import BINS, Record, calibration_error, confusion, per_label, summarise

LABELS = ("change", "neutral", "sustain", "question", "other")
ROLES = {"client": ("change", "neutral", "sustain"), "therapist": ("question", "other")}
SETS = (*LABELS, "change|neutral", "change|sustain", "other|question")
TEXTS = ("tell me more", "what would help you", "go on", "how was the week", "well then")


def record(label: str, prediction: str, **changed: object) -> Record:
    made = Record("u", "classify", "c", "client", None, label, prediction, (0.0,), 1.0, 2)
    return replace(made, **changed)


def records(count: int = 200, seed: int = 0, sets: bool = False) -> list[Record]:
    """Predictions that are right in six of ten cases, each with scores of which it has the best."""
    rng = np.random.default_rng(seed)
    label_names = SETS if sets else LABELS
    rows = []
    for index in range(count):
        role = str(rng.choice(list(ROLES)))
        label = str(rng.choice([name for name in label_names if set(name.split("|")) <= set(ROLES[role])]))
        prediction = label if rng.random() < 0.6 else str(rng.choice(label_names))
        scores = np.log(rng.dirichlet(np.ones(len(label_names))))
        best, predicted = int(scores.argmax()), label_names.index(prediction)
        scores[[best, predicted]] = scores[[predicted, best]]
        row = record(label, prediction, id=f"u{index}", conversation=f"c{index % 11}", speaker=role)
        subset = "hard" if index % 4 == 0 else None
        loss, tokens = float(rng.random() * 5), int(rng.integers(1, 9))
        rows.append(replace(row, subset=subset, scores=tuple(scores.tolist()), loss=loss, tokens=tokens))
    return rows


def texts(count: int = 40, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [
        record(
            str(rng.choice(TEXTS)),
            str(rng.choice([*TEXTS, "tell me", "what would help", ""])),
            id=f"u{index}",
            task="response",
            speaker="therapist",
            scores=(),
            loss=float(rng.random() * 9),
            tokens=int(rng.integers(1, 9)),
            ended=bool(rng.random() < 0.7),
        )
        for index in range(count)
    ]


def summary(rows: list[Record], labels: tuple[str, ...] = LABELS) -> dict[str, float]:
    return summarise(rows, {"classify": labels}, ROLES)


def pairs(rows: list[Record]) -> tuple[list[str], list[str]]:
    return [row.label for row in rows], [row.prediction for row in rows]


def test_metrics_of_single_labels_equal_scikit_learn() -> None:
    rows = records()
    truth, predicted_labels = pairs(rows)
    values = summary(rows)
    assert values["accuracy"] == accuracy_score(truth, predicted_labels)
    for name in ("macro", "weighted"):
        assert values[f"{name}_f1"] == f1_score(truth, predicted_labels, labels=list(LABELS), average=name)
    for role, own_labels in ROLES.items():
        part = [row for row in rows if row.speaker == role]
        expected = f1_score(*pairs(part), labels=list(own_labels), average="macro")
        assert values[f"macro_f1_{role}"] == expected
        assert values[f"accuracy_{role}"] == accuracy_score(*pairs(part))
    assert values["accuracy_hard"] == accuracy_score(*pairs([row for row in rows if row.subset == "hard"]))
    assert (confusion(rows, LABELS) == confusion_matrix(truth, predicted_labels, labels=list(LABELS))).all()
    report = classification_report(truth, predicted_labels, labels=list(LABELS), output_dict=True)
    for label, row in per_label(rows, LABELS).items():
        assert list(row.values()) == list(report[label].values())  # precision, recall, F1, support


def test_metrics_of_label_sets_equal_scikit_learn() -> None:
    """F1 is over the single labels; accuracy counts sets that are right."""
    rows = records(sets=True)
    truth, predicted_labels = pairs(rows)
    values = summary(rows, SETS)
    binarizer = MultiLabelBinarizer(classes=list(LABELS))
    indicators = [binarizer.fit_transform([text.split("|") for text in side]) for side in (truth, predicted_labels)]
    for name in ("macro", "weighted"):
        assert values[f"{name}_f1"] == f1_score(*indicators, average=name, zero_division=0)
    assert values["accuracy"] == accuracy_score(*indicators)
    client = np.array([row.speaker == "client" for row in rows])
    part = [side[client][:, :3] for side in indicators]
    assert values["macro_f1_client"] == f1_score(*part, average="macro", zero_division=0)
    assert per_label(rows, SETS).keys() == set(LABELS)
    assert per_label(rows, SETS)["change"]["support"] == indicators[0][:, 0].sum()
    assert (confusion(rows, SETS) == confusion_matrix(truth, predicted_labels, labels=list(SETS))).all()


def test_label_that_never_occurs_counts_in_the_macro_average() -> None:
    rows = [record("change", "change", scores=(0.0, -1.0))] * 3
    values = summarise(rows, {"classify": ("change", "neutral")}, {"client": ("change", "neutral")})
    assert values["macro_f1"] == 0.5
    assert values["weighted_f1"] == 1.0


@pytest.mark.parametrize("sets", [False, True])
def test_prediction_outside_the_labels_is_wrong_and_no_class(sets: bool) -> None:
    label_names = SETS if sets else LABELS
    rows = records(sets=sets)
    odd = [replace(row, prediction="nonsense") if index % 5 == 0 else row for index, row in enumerate(rows)]
    truth, predicted_labels = pairs(odd)
    values = summary(odd, label_names)
    assert values["accuracy"] == np.mean(
        [left == right_side for left, right_side in zip(truth, predicted_labels, strict=True)]
    )
    assert values["accuracy"] < summary(rows, label_names)["accuracy"]
    if not sets:
        expected = f1_score(truth, predicted_labels, labels=list(LABELS), average="macro")
        assert values["macro_f1"] == pytest.approx(expected)
        assert expected > f1_score(truth, predicted_labels, average="macro", zero_division=0)  # with a class of its own
    assert per_label(odd, label_names).keys() == set(LABELS)
    assert confusion(odd, label_names).shape == (len(label_names), len(label_names))
    assert 0 <= values["ece"] <= 1


def test_role_without_labels_of_the_task_has_no_metrics() -> None:
    """The speaker of the last turn says nothing about the quality of a session."""
    rows = [
        record("high", predicted_labels, task="quality", speaker=speaker, scores=(0.0, -1.0))
        for predicted_labels in ("high", "low")
        for speaker in ROLES
    ]
    values = summarise(rows, {"quality": ("high", "low")}, ROLES)
    assert values["accuracy"] == 0.5
    assert not [name for name in values if "client" in name or "therapist" in name]


def slow_calibration_error(rows: list[Record]) -> float:
    """Guo et al., equation 3: |accuracy - confidence| of every bin ((m - 1) / M, m / M], by its share."""
    total = 0.0
    for number in range(BINS):
        inside = []
        for row in rows:
            shares = [math.exp(score) for score in row.scores]
            confidence = max(shares) / sum(shares)
            if number / BINS < confidence <= (number + 1) / BINS:
                inside.append((confidence, row.label == row.prediction))
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(left for left, _ in inside) / len(inside)
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    return total


def test_calibration_error_equals_the_explicit_sum() -> None:
    rows = records()
    assert calibration_error(rows) == pytest.approx(slow_calibration_error(rows))
    assert summary(rows)["ece"] == calibration_error(rows)
    shifted = [replace(row, scores=tuple(score - 800 for score in row.scores)) for row in rows]  # exp would be zero
    assert calibration_error(shifted) == pytest.approx(calibration_error(rows))
    assert calibration_error([record("change", "change", scores=(0.0, -1e4))]) == 0  # the last bin


def test_metrics_of_texts_equal_those_of_their_tools() -> None:
    rows = texts()
    values = summarise(rows, {"response": ()}, ROLES)
    truth, predicted_labels = pairs(rows)
    assert values["bleu"] == sacrebleu.corpus_bleu(predicted_labels, [truth]).score > 0
    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(truth, predicted_labels, strict=True)]
    assert values["rouge_l"] == pytest.approx(np.mean(scores))
    nats, tokens = sum(row.loss for row in rows), sum(row.tokens for row in rows)
    assert values["loss"] == pytest.approx(nats / tokens)
    assert values["perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert values["eos_rate"] == np.mean([row.ended for row in rows])
    assert values["run_on"] == pytest.approx(1 - values["eos_rate"])
    assert values["empty"] == predicted_labels.count("") / len(rows) > 0
    assert values.keys() == {"loss", "perplexity", "bleu", "rouge_l", "eos_rate", "run_on", "empty"}

    hopeless = [replace(row, loss=1e6) for row in rows]
    assert math.isfinite(summarise(hopeless, {"response": ()}, ROLES)["perplexity"])


def test_metrics_of_the_first_task_have_no_prefix() -> None:
    rows, spoken, later = records(), texts(), [replace(row, task="forecast") for row in records(seed=1)]
    labels = {"classify": LABELS, "forecast": LABELS, "response": ()}
    values = summarise([*spoken, *later, *rows], labels, ROLES)
    expected = summary(rows)
    expected |= {f"forecast/{name}": value for name, value in summarise(later, {"forecast": LABELS}, ROLES).items()}
    expected |= {f"response/{name}": value for name, value in summarise(spoken, {"response": ()}, ROLES).items()}
    assert values == expected


def test_order_of_records_changes_nothing() -> None:
    rows = records()
    shuffled = [rows[index] for index in np.random.default_rng(1).permutation(len(rows))]
    assert summary(rows) == pytest.approx(summary(shuffled), rel=1e-12)
    assert summary(rows)["loss"] == pytest.approx(sum(row.loss for row in rows) / sum(row.tokens for row in rows))


def test_role_with_a_single_label_is_measured_like_any_other() -> None:
    """scikit-learn treats a matrix of one column as a binary problem."""
    rows = [
        record("note", predicted_labels, speaker="therapist", scores=(0.0, -1.0))
        for predicted_labels in ("note", "note", "change")
    ]
    values = per_label(rows, ("note",))["note"]
    truth, predicted_labels = pairs(rows)
    assert (
        values["f1"]
        == pytest.approx(f1_score(truth, predicted_labels, labels=["note"], average=None)[0])
        == pytest.approx(0.8)
    )
    assert (values["support"], values["recall"]) == (3, pytest.approx(2 / 3))
