"""The human ceiling of tasks and splits, with intervals by session, and a model on the same turns."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

from data.corpus.votes import ALPHA, KAPPA
from data.loading.tasks import items
from data.shards.dataset import Shards
from model.evaluation.ceiling import Ceiling, ceilings
from model.evaluation.metrics import Record
from tests.conftest import LABELS
from tests.model.common import voted


def record(shards: Shards, row: int, prediction: str) -> Record:
    columns = shards.columns
    name, conversation, label = (columns[column][row] for column in ("id", "conversation", "label"))
    return Record(name, "classify", conversation, "client", None, label, prediction, (0.0,), 1.0, 2)


def test_ceiling_counts_the_items_of_a_split(disputed: Shards) -> None:
    found = ceilings(disputed, ["classify", "client_talk", "forecast", "response", "quality"], ["train", "val"])
    assert [(one.task, one.split) for one in found] == [
        (task, split) for task in ("classify", "client_talk") for split in ("train", "val")
    ]
    columns, ceiling = disputed.columns, found[0]
    rows = [row for _, row in items(disputed, "classify", "train") if columns["votes"][row]]
    assert ceiling.turns == tuple(columns["id"][row] for row in rows)
    assert ceiling.sessions == len({columns["conversation"][row] for row in rows})
    assert ceiling.annotators == (10, 10)
    # Six of ten see a majority of six or five to four against four; the other four see six.
    given, true = [], []
    for row in rows:
        votes = dict(columns["votes"][row])
        given += [label for label, count in votes.items() for _ in range(count)]
        true += [columns["label"][row]] * 10
    expected = (accuracy_score(true, given), f1_score(true, given, average="macro"), cohen_kappa_score(true, given))
    accuracy, macro_f1, kappa, fleiss = ceiling.figures.values()
    for interval, value in zip((accuracy, macro_f1, kappa), expected, strict=True):
        assert interval is not None
        assert interval.value == pytest.approx(value)
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < value < interval.high
    assert fleiss is not None
    assert list(ceiling.figures)[-1] == KAPPA
    assert Ceiling.model_validate(json.loads(json.dumps(ceiling.model_dump(mode="json")))) == ceiling


def test_model_is_measured_on_the_same_turns(disputed: Shards) -> None:
    [ceiling] = ceilings(disputed, ["classify"], ["train"])
    rows = [row for _, row in items(disputed, "classify", "train")]
    records = [record(disputed, row, LABELS[row % 3]) for row in rows]
    on_turns = [one for one in records if one.id in ceiling.turns]
    assert 0 < len(on_turns) < len(records)
    found = ceiling.model_figures([*records, *(replace(one, task="client_talk") for one in records)])
    true, given = [one.label for one in on_turns], [one.prediction for one in on_turns]
    assert list(found) == ["accuracy", "macro_f1", "kappa"]
    values = [value.value for value in found.values() if value is not None]
    expected = [accuracy_score(true, given), f1_score(true, given, average="macro"), cohen_kappa_score(true, given)]
    assert values == pytest.approx(expected)
    human, model = ceiling.lines(records, "the best trial")
    assert human.startswith(f"human ceiling of classify (train, {len(ceiling.turns)} turns of ")
    assert "with 10 annotators): one annotator against the majority of the others accuracy 0." in human
    assert f"; all of them {KAPPA} 0." in human
    assert model.startswith(f"the best trial on the same turns: accuracy {values[0]:.3f}")
    assert len(ceiling.lines()) == 1
    assert ceiling.to_json()["model"] == {}
    content = ceiling.to_json(records)["model"]
    assert isinstance(content, dict)
    assert content["kappa"]["value"] == values[2]


def test_corpus_without_votes_has_no_ceiling(corpus: Shards) -> None:
    assert ceilings(corpus, ["classify", "response"], ["train", "val", "test"]) == []


def test_unequal_annotators_get_alpha_and_equal_answers_no_kappa(tmp_path: Path) -> None:
    shards = voted(tmp_path / "a", lambda number, turn: {str(turn.label): 2 + number % 2})
    [ceiling] = ceilings(shards, ["classify"], ["train"])
    assert (ceiling.annotators, ceiling.figures[ALPHA]) != ((2, 2), None)
    assert "with 2 to 3 annotators" in ceiling.lines()[0]
    same = voted(tmp_path / "b", lambda number, turn: {"change": 2} if turn.label == "change" else {})
    [ceiling] = ceilings(same, ["classify"], ["train"])
    assert ceiling.figures["kappa"] is ceiling.figures[KAPPA] is None
    assert "kappa undefined" in ceiling.lines()[0]
    assert '"kappa": null' in json.dumps(ceiling.to_json(), allow_nan=False)
