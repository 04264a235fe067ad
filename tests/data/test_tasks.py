"""Tasks: which turns are items, what is read for each, and which answers are possible."""

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
SPEAKERS = ["therapist", "client"] * 2 + ["therapist"] * 2 + ["client", "therapist"]
AUDIO_TURNS = {  # task → index of each item → index of its audio turn
    "classify": {1: 1, 2: 2, 5: 5},
    "client_talk": {1: 1},
    "therapist_behaviour": {2: 2, 5: 5},
    "forecast": {2: 1, 3: 2, 4: 2, 5: 2, 7: 6},
    "response": {2: 1, 4: 2, 7: 6},
    "quality": {7: 6},
}
WITHOUT_AUDIO = AUDIO_TURNS | {
    "classify": [0, 1, 2, 3, 4, 5, 7],
    "client_talk": [1, 3],
    "therapist_behaviour": [0, 2, 4, 5, 7],
    "forecast": [1, 2, 3, 4, 5, 7],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("tasks") / "shards", DIALOGUE, qualities=("high", "low"))


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("tasks") / "silent", DIALOGUE.replace("!", ""))


def positions(shards: Shards, task: str, split: str) -> list[tuple[int, int]]:
    """(session, index) of the items."""
    return [tuple(map(int, shards.columns["id"][row].split("/"))) for _, row in items(shards, task, split)]


def test_every_declared_task_is_tested() -> None:
    assert list(AUDIO_TURNS) == list(TASKS)


@pytest.mark.parametrize("task", AUDIO_TURNS)
def test_items_of_a_task(task: str, shards: Shards, silent: Shards) -> None:
    for made, indices in ((shards, AUDIO_TURNS[task]), (silent, WITHOUT_AUDIO[task])):
        seen = set()
        for split in SPLITS:
            found = positions(made, task, split)
            sessions = sorted({session for session, _ in found})
            assert found == [(session, index) for session in sessions for index in indices]
            assert seen.isdisjoint(sessions)
            seen |= set(sessions)
        assert seen == set(range(6))


@pytest.mark.parametrize("history", [0, 1, 10])
@pytest.mark.parametrize("task", AUDIO_TURNS)
def test_text_and_clip_of_examples(task: str, history: int, shards: Shards) -> None:
    config = DataConfig(history=history)
    for item, (session, index) in zip(items(shards, task, "train"), positions(shards, task, "train"), strict=True):
        example = read_example(shards, item, config, with_audio=True)
        last, audio = (index - 1 if task in ("forecast", "response") else index), AUDIO_TURNS[task][index]
        first = max(0, min(last - history, audio))
        assert example.turns == tuple((SPEAKERS[turn], text(session, turn)) for turn in range(first, last + 1))
        assert example.audio_turn == audio - first
        assert np.array_equal(example.pcm, clip(session, audio))
        assert len(example.pcm) == clip_samples(shards, item, config)
        assert (example.task, example.conversation, example.speaker) == (task, f"s{session}", SPEAKERS[index])
        assert same(read_example(shards, item, config, with_audio=False), replace(example, pcm=None))


@pytest.mark.parametrize("task", ["forecast", "response"])
def test_example_has_nothing_of_later_turns(task: str, shards: Shards, tmp_path: Path) -> None:
    for index in AUDIO_TURNS[task]:
        made = corpus([DIALOGUE] * 6, qualities=("high", "low"))
        for session, conversation in enumerate(made.conversations):
            for turn in conversation.turns[index:]:
                turn.text, turn.audio = "something else", clip(90 + session, turn.index)
        other = prepare(made, tmp_path / str(index))
        for item, (_, position) in zip(items(shards, task, "train"), positions(shards, task, "train"), strict=True):
            if position == index:
                before, after = (read_example(each, item, DataConfig(), with_audio=True) for each in (shards, other))
                assert same(before, replace(after, answer=before.answer))


def test_answers_are_labels_texts_and_qualities(shards: Shards) -> None:
    def answers(task: str) -> list[tuple[str, str]]:
        examples = [read_example(shards, item, DataConfig(), with_audio=False) for item in items(shards, task, "val")]
        return [(example.id, example.answer) for example in examples]

    [(session, _), *_] = positions(shards, "classify", "val")
    expected = {1: "change", 2: "question", 5: "question"}
    assert answers("classify") == [(f"{session}/{index}", label) for index, label in expected.items()]
    assert answers("forecast")[2:4] == [(f"{session}/4", "reflection"), (f"{session}/5", "question")]
    assert answers("response")[0] == (f"{session}/2", text(session, 2))
    assert answers("quality") == [(f"s{session}", ("high", "low")[session % 2])]


def test_subset_is_that_of_the_classified_turn(corpus: Shards) -> None:
    for task, subsets in {"classify": {"ambiguous", "clear"}, "forecast": {None}, "quality": {None}}.items():
        examples = [read_example(corpus, item, DataConfig(), False) for item in items(corpus, task, "train")]
        assert {example.subset for example in examples} == subsets


def test_answer_sets_count_training_items(shards: Shards) -> None:
    found = answer_sets(shards, list(AUDIO_TURNS))
    trained = len(items(shards, "quality", "train"))
    assert list(found) == list(AUDIO_TURNS)
    assert found["classify"] == AnswerSet(LABELS, (trained, 0, 0, 2 * trained, 0))
    assert found["client_talk"] == AnswerSet(ROLES["client"], (trained, 0))
    assert found["therapist_behaviour"] == AnswerSet(ROLES["therapist"], (0, 2 * trained, 0))
    assert found["forecast"] == AnswerSet(LABELS, (0, trained, trained, 2 * trained, trained))
    assert found["response"] == AnswerSet()
    assert found["quality"].labels == ("high", "low")
    assert sum(found["quality"].counts) == trained


def test_session_without_quality_is_not_rated(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", DIALOGUE, sessions=12, qualities=("high", "low", None))
    rated = [session for split in SPLITS for session, _ in positions(shards, "quality", split)]
    assert sorted(rated) == [session for session in range(12) if session % 3 != 2]


LACKING = {
    "client_talk": ("T:question! C! T:other!", "a labelled turn of the client", {}),
    "therapist_behaviour": ("C:change! T! C:neutral!", "a labelled turn of the therapist", {}),
    "forecast": ("C:change! T!", "a labelled turn after another turn", {}),
    "response": ("T:question! T! C:change!", "a turn with text of the therapist after another turn", {}),
    "quality": ("C:change! T:question!", "a session with a quality", {"qualities": (None,)}),
}


@pytest.mark.parametrize("task", LACKING)
def test_split_without_items_is_refused(task: str, tmp_path: Path) -> None:
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


def test_turns_without_clip_or_label_are_no_items(tmp_path: Path) -> None:
    """In AnnoMI the last turn of a session has no clip; a corpus without labels may be used for replies."""
    shards = make(tmp_path / "clip", "T! C:change")
    with pytest.raises(DataError, match="no items for the task classify"):
        items(shards, "classify", "train")
    assert len(items(shards, "forecast", "train")) == 4
    shards = make(tmp_path / "label", "C! T C! T", sessions=9)
    assert all(items(shards, "response", split) for split in SPLITS)
    with pytest.raises(DataError, match="no items for the task classify"):
        items(shards, "classify", "train")


def test_joined_labels_of_the_training_split_are_answers(tmp_path: Path) -> None:
    pairs = "question|reflection other|question neutral|question change|question change|other change|neutral".split()
    spoken = corpus([f"C:{pair}! T:question!" for pair in pairs])
    spoken.roles = dict.fromkeys(spoken.roles, LABELS)
    shards = prepare(spoken, tmp_path / "shards")
    by_split = {
        split: [pairs[session] for session, index in positions(shards, "classify", split) if index == 0]
        for split in SPLITS
    }
    assert len(by_split["train"]) == 4
    found = answer_sets(shards, ["classify", "forecast"])
    assert found["classify"] == AnswerSet((*LABELS, *sorted(by_split["train"])), (0, 0, 0, 4, 0, 1, 1, 1, 1))
    assert found["forecast"] == AnswerSet(LABELS, (0, 0, 0, 4, 0))
    first = read_example(shards, items(shards, "classify", "val")[0], DataConfig(), False)
    assert first.answer == by_split["val"][0]
    for split, joined in by_split.items():
        single = [label for pair in joined for label in split_label(pair)] + ["question"] * len(joined)
        assert shards.manifest.label_counts[split] == {label: single.count(label) for label in LABELS}


@pytest.mark.parametrize("label", ["unknown", "question|unknown"])
def test_undeclared_labels_are_refused(label: str, tmp_path: Path) -> None:
    spoken = corpus(["C:change! T:question!"] * 6)
    spoken.conversations[3].turns[1].label = label
    message = "E_LABEL , 3/1: label 'unknown' is unknown; expected: other, question, reflection"
    with pytest.raises(DataError, match=message):
        prepare(spoken, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_several_labels_are_in_declared_order(tmp_path: Path) -> None:
    spoken = corpus(["C:change! T:reflection|other|other!"] * 6)
    shards = prepare(spoken, tmp_path / "shards")
    assert set(shards.columns["label"]) == {"change", "other|reflection"}
    spoken.labels = (*LABELS, "a|b")
    with pytest.raises(DataError, match=r"label 'a\|b' contains '\|'"):
        prepare(spoken, tmp_path / "again")
