"""The tasks: what is predicted, from which part of a dialogue, and which turns of a corpus are its items."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data.corpus.schema import split_label
from data.errors import MisfitError
from data.shards.dataset import Shards

Item = tuple[str, int]  # task and row of the index: the turn that is classified or predicted


@dataclass(frozen=True)
class Task:
    """A declaration. An item is a turn; its answer is the turn's label, its text, or the label of its session."""

    name: str
    answer: Literal["label", "text", "quality"]
    reads: Literal["turn", "before"]  # whether the dialogue ends with the item's turn or just before it
    cue: str  # last words of the prompt; {role} is whose turn the item is
    instruction: str
    role: str | None = None  # items are turns of this role only


TASKS = {
    task.name: task
    for task in (
        Task("classify", "label", "turn", "label", "Name the code of the last utterance."),
        Task("client_talk", "label", "turn", "talk type", "Name the type of the client's last talk.", "client"),
        Task(
            "therapist_behaviour",
            "label",
            "turn",
            "behaviour",
            "Name the behaviour in the therapist's last utterance.",
            "therapist",
        ),
        Task("forecast", "label", "before", "next {role} label", "Name the code of the utterance that comes next."),
        Task("response", "text", "before", "{role}", "Write the therapist's reply.", "therapist"),
        Task("quality", "quality", "turn", "session quality", "Rate the quality of the session."),
    )
}


def has_sound(shards: Shards) -> bool:
    """Whether any turn of the corpus has a clip."""
    return any(hours > 0 for hours in shards.manifest.hours.values())


def items(shards: Shards, name: str, split: str) -> list[Item]:
    """The items of a task in a split, in the order of the index.

    The same items for every modality, so that text and speech are measured alike: where the corpus has sound, items
    without any clip to hear are left out.

    Raises:
        MisfitError: there is none.
    """
    task, columns = TASKS[name], shards.columns
    rows = [row for row in range(len(columns["id"])) if columns["split"][row] == split and is_item(shards, task, row)]
    if has_sound(shards):
        rows = [row for row in rows if heard_row(shards, task, row) is not None]
    if not rows:
        raise MisfitError(
            f"{shards.folder}: the {split} split has nothing for the task {name} ({_needs(task)}); set tasks.{name} to "
            "0, or choose another split or corpus"
        )
    return [(name, row) for row in rows]


def _needs(task: Task) -> str:
    what = {"label": "a labelled turn", "text": "a turn with text", "quality": "a session with a quality"}[task.answer]
    role = f" of the {task.role}" if task.role else ""
    return what + role + (" after another turn" if task.reads == "before" else "")


def is_item(shards: Shards, task: Task, row: int) -> bool:
    """Whether a task can be asked about a turn, whatever is heard."""
    columns = shards.columns
    if task.role is not None and columns["speaker"][row] != task.role:
        return False
    if task.answer == "quality":
        return columns["quality"][row] is not None and row == shards.sessions[row][-1]
    if task.reads == "before" and row == shards.sessions[row][0]:
        return False
    if task.answer == "text":
        return bool(columns["text"][row].strip()) and columns["speaker"][row - 1] != columns["speaker"][row]
    return columns["label"][row] is not None


def last_read(task: Task, row: int) -> int:
    """The last turn that may be read for an item."""
    return row if task.reads == "turn" else row - 1


def heard_row(shards: Shards, task: Task, row: int) -> int | None:
    """The turn whose clip is heard: the last one with sound in the dialogue; None without one.

    A turn that is classified by itself must have a clip of its own.
    """
    last = last_read(task, row)
    first = last if task.answer == "label" and task.reads == "turn" else shards.sessions[row][0]
    samples = shards.columns["n_samples"]
    for other in range(last, first - 1, -1):
        if samples[other] > 0:
            return other
    return None


def answer(shards: Shards, item: Item) -> str:
    """What is to be predicted: a label, a text, or a quality."""
    name, row = item
    value: str = shards.columns[TASKS[name].answer][row]
    return value


@dataclass(frozen=True)
class AnswerSet:
    """The possible answers of a task and how often each occurs in training; both empty where the answer is text."""

    labels: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


def answer_sets(shards: Shards, names: Sequence[str]) -> dict[str, AnswerSet]:
    """The answers of several tasks: labels in order, then the sets of labels that occur in training.

    Raises:
        MisfitError: the training split has nothing for a task.
    """
    return {name: _answer_set(shards, TASKS[name]) for name in names}


def _answer_set(shards: Shards, task: Task) -> AnswerSet:
    counts = Counter(answer(shards, item) for item in items(shards, task.name, "train"))
    if task.answer == "text":
        return AnswerSet()
    manifest = shards.manifest
    own = manifest.roles.get(task.role, ()) if task.role else manifest.labels
    singles = manifest.qualities if task.answer == "quality" else tuple(name for name in manifest.labels if name in own)
    sets = sorted(label for label in counts if len(split_label(label)) > 1)
    labels = (*singles, *sets)
    return AnswerSet(labels, tuple(counts[label] for label in labels))
