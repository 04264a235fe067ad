"""Tasks: which turns are items, what is read and heard for each, and what may be answered."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus.schema import SPLITS, split_label
from data.errors import DataError
from data.loading.examples import clip_samples, read_example
from data.loading.tasks import TASKS, AnswerSet, answer_sets, items
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.common import LABELS, ROLES, clip, corpus, make, same, text

#            0          1         2           3         4            5           6  7
DIALOGUE = "T:question C:change! T:question! C:neutral T:reflection T:question! C! T:other"
HEARD = {  # by task: index of each item and of the turn that is heard for it
    "classify": {1: 1, 2: 2, 5: 5},
    "client_talk": {1: 1},
    "therapist_behaviour": {2: 2, 5: 5},
    "forecast": {2: 1, 3: 2, 4: 2, 5: 2, 7: 6},
    "response": {2: 1, 4: 2, 7: 6},
    "quality": {7: 6},
}
WITHOUT_SOUND = HEARD | {
    "classify": [0, 1, 2, 3, 4, 5, 7],
    "client_talk": [1, 3],
    "therapist_behaviour": [0, 2, 4, 5, 7],
    "forecast": [1, 2, 3, 4, 5, 7],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("tasks") / "shards", DIALOGUE, qualities=("high", "low"))


def places(shards: Shards, task: str, split: str) -> list[tuple[int, int]]:
    """(session, index) of the items."""
    return [tuple(map(int, shards.columns["id"][row].split("/"))) for _, row in items(shards, task, split)]


def test_every_declared_task_is_tested() -> None:
    assert list(HEARD) == list(TASKS)


@pytest.mark.parametrize("task", HEARD)
def test_the_items_of_a_task(task: str, shards: Shards, tmp_path: Path) -> None:
    silent = make(tmp_path / "silent", DIALOGUE.replace("!", ""))
    for made, indices in ((shards, HEARD[task]), (silent, WITHOUT_SOUND[task])):
        dealt = set()
        for split in SPLITS:
            found = places(made, task, split)
            sessions = sorted({session for session, _ in found})
            assert found == [(session, index) for session in sessions for index in indices]
            assert dealt.isdisjoint(sessions)
            dealt |= set(sessions)
        assert dealt == set(range(6))


@pytest.mark.parametrize("history", [0, 1, 10])
@pytest.mark.parametrize("task", HEARD)
def test_what_is_read_and_heard(task: str, history: int, shards: Shards) -> None:
    config, roles = (
        DataConfig(history=history),
        ["therapist", "client"] * 2 + ["therapist"] * 2 + ["client", "therapist"],
    )
    for item, (session, index) in zip(items(shards, task, "train"), places(shards, task, "train"), strict=True):
        example = read_example(shards, item, config, with_audio=True)
        last, heard = (index - 1 if task in ("forecast", "response") else index), HEARD[task][index]
        first = max(0, min(last - history, heard))
        assert example.turns == tuple((roles[place], text(session, place)) for place in range(first, last + 1))
        assert example.audio_turn == heard - first
        assert np.array_equal(example.pcm, clip(session, heard))
        assert len(example.pcm) == clip_samples(shards, item, config)
        assert (example.task, example.conversation, example.speaker) == (task, f"s{session}", roles[index])
        assert same(read_example(shards, item, config, with_audio=False), replace(example, pcm=None))


@pytest.mark.parametrize("task", ["forecast", "response"])
def test_nothing_of_the_next_turn_or_later_reaches_an_example(task: str, shards: Shards, tmp_path: Path) -> None:
    for index in HEARD[task]:
        made = corpus([DIALOGUE] * 6, qualities=("high", "low"))
        for session, conversation in enumerate(made.conversations):
            for turn in conversation.turns[index:]:
                turn.text, turn.audio = "something else", clip(90 + session, turn.index)
        other = prepare(made, tmp_path / str(index))
        for item, (_, place) in zip(items(shards, task, "train"), places(shards, task, "train"), strict=True):
            if place == index:
                before, after = (read_example(one, item, DataConfig(), with_audio=True) for one in (shards, other))
                assert same(before, replace(after, answer=before.answer))


def test_answers_are_labels_texts_and_qualities(shards: Shards) -> None:
    def answers(task: str) -> list[tuple[str, str]]:
        examples = [read_example(shards, item, DataConfig(), with_audio=False) for item in items(shards, task, "val")]
        return [(example.id, example.answer) for example in examples]

    [(session, _), *_] = places(shards, "classify", "val")
    assert answers("classify") == [
        (f"{session}/1", "change"),
        (f"{session}/2", "question"),
        (f"{session}/5", "question"),
    ]
    assert answers("forecast")[2:4] == [(f"{session}/4", "reflection"), (f"{session}/5", "question")]
    assert answers("response")[0] == (f"{session}/2", text(session, 2))
    assert answers("quality") == [(f"s{session}", ("high", "low")[session % 2])]


def test_a_subset_is_told_of_the_turn_that_is_classified_only(corpus: Shards) -> None:
    for task, subsets in {"classify": {"ambiguous", "clear"}, "forecast": {None}, "quality": {None}}.items():
        examples = [read_example(corpus, item, DataConfig(), False) for item in items(corpus, task, "train")]
        assert {example.subset for example in examples} == subsets


def test_answer_sets(shards: Shards) -> None:
    found = answer_sets(shards, list(HEARD))
    trained = len(items(shards, "quality", "train"))
    assert list(found) == list(HEARD)
    assert found["classify"] == AnswerSet(LABELS, (trained, 0, 0, 2 * trained, 0))
    assert found["client_talk"] == AnswerSet(ROLES["client"], (trained, 0))
    assert found["therapist_behaviour"] == AnswerSet(ROLES["therapist"], (0, 2 * trained, 0))
    assert found["forecast"] == AnswerSet(LABELS, (0, trained, trained, 2 * trained, trained))
    assert found["response"] == AnswerSet()
    assert found["quality"].labels == ("high", "low")
    assert sum(found["quality"].counts) == trained


def test_a_session_without_a_quality_is_not_rated(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", DIALOGUE, sessions=12, qualities=("high", "low", None))
    rated = [session for split in SPLITS for session, _ in places(shards, "quality", split)]
    assert sorted(rated) == [session for session in range(12) if session % 3 != 2]


LACKING = {
    "client_talk": ("T:question! C! T:other!", "a labelled turn of the client", {}),
    "therapist_behaviour": ("C:change! T! C:neutral!", "a labelled turn of the therapist", {}),
    "forecast": ("C:change! T!", "a labelled turn after another turn", {}),
    "response": ("T:question! T! C:change!", "a turn with text of the therapist after another turn", {}),
    "quality": ("C:change! T:question!", "a session with a quality", {"qualities": (None,)}),
}


@pytest.mark.parametrize("task", LACKING)
def test_a_split_with_nothing_for_a_task_is_named(task: str, tmp_path: Path) -> None:
    dialogue, needs, changed = LACKING[task]
    shards = make(tmp_path / "shards", dialogue, **changed)
    for split in SPLITS:
        with pytest.raises(DataError) as error:
            items(shards, task, split)
        assert str(error.value) == (
            f"{shards.folder}: the {split} split has no items for the task {task} (needs {needs}); set tasks.{task} to "
            "0, or choose another split or corpus"
        )
    with pytest.raises(DataError, match=f"the train split has no items for the task {task}"):
        answer_sets(shards, [task])


def test_labels_that_nobody_can_hear_are_no_items(tmp_path: Path) -> None:
    """As in AnnoMI, where the last turn of a session has no clip."""
    shards = make(tmp_path / "shards", "T! C:change")
    with pytest.raises(DataError, match="no items for the task classify"):
        items(shards, "classify", "train")
    assert len(items(shards, "forecast", "train")) == 4


PAIRS = [
    "question|reflection",
    "other|question",
    "neutral|question",
    "change|question",
    "change|other",
    "change|neutral",
]


def test_sets_of_labels_are_answers_if_they_occur_in_training(tmp_path: Path) -> None:
    spoken = corpus([f"C:{pair}! T:question!" for pair in PAIRS])
    spoken.roles = dict.fromkeys(spoken.roles, LABELS)
    shards = prepare(spoken, tmp_path / "shards")
    own = {
        split: [PAIRS[session] for session, index in places(shards, "classify", split) if index == 0]
        for split in SPLITS
    }
    assert len(own["train"]) == 4
    found = answer_sets(shards, ["classify", "forecast"])
    assert found["classify"] == AnswerSet((*LABELS, *sorted(own["train"])), (0, 0, 0, 4, 0, 1, 1, 1, 1))
    assert found["forecast"] == AnswerSet(LABELS, (0, 0, 0, 4, 0))
    assert read_example(shards, items(shards, "classify", "val")[0], DataConfig(), False).answer == own["val"][0]
    for split in SPLITS:
        single = [label for pair in own[split] for label in split_label(pair)] + ["question"] * len(own[split])
        assert shards.manifest.label_counts[split] == {label: single.count(label) for label in LABELS}


def test_a_corpus_without_labels_can_be_split_for_replies(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", "C! T C! T", sessions=9)
    assert all(items(shards, "response", split) for split in ("train", "val", "test"))
    with pytest.raises(DataError, match="no items for the task classify"):
        items(shards, "classify", "train")


@pytest.mark.parametrize("label", ["unheard-of", "question|unheard-of"])
def test_labels_must_be_declared(label: str, tmp_path: Path) -> None:
    spoken = corpus(["C:change! T:question!"] * 6)
    spoken.conversations[3].turns[1].label = label
    known = "other, question, reflection"
    with pytest.raises(DataError, match=f"E_LABEL , 3/1: label 'unheard-of' is unknown; expected: {known}"):
        prepare(spoken, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_several_labels_stand_in_the_order_of_their_declaration(tmp_path: Path) -> None:
    spoken = corpus(["C:change! T:reflection|other|other!"] * 6)
    shards = prepare(spoken, tmp_path / "shards")
    assert set(shards.columns["label"]) == {"change", "other|reflection"}
    spoken.labels = (*LABELS, "a|b")
    with pytest.raises(DataError, match=r"label 'a\|b' contains '\|'"):
        prepare(spoken, tmp_path / "again")
