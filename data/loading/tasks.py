"""The tasks: what is predicted from which part of a dialogue, and which turns of a corpus are items of a task."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data.corpus.label_counts import label_problems
from data.corpus.schema import SPLITS, split_label
from data.corpus.votes import counts_labels, vote_shares
from data.errors import MisfitError
from data.shards.dataset import Shards

Item = tuple[str, int]  # name of the task, and row of the turn that is classified or predicted


@dataclass(frozen=True)
class Task:
    """A task. Its items are turns; the answer is the label or text of the turn, or the quality of its session."""

    name: str
    answer: Literal["label", "text", "quality"]
    reads: Literal["turn", "before"]  # whether the dialogue ends with the turn or with the turn before it
    cue: str  # last words of the prompt; {role} is the role of the turn
    instruction: str
    role: str | None = None  # only turns of this role are items


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


def has_audio(shards: Shards) -> bool:
    """Return whether any turn of the corpus has a clip."""
    return any(hours > 0 for hours in shards.manifest.hours.values())


def items(shards: Shards, name: str, split: str) -> list[Item]:
    """Return the items of a task in a split, in the order of the index.

    If the corpus has audio, items without a clip are left out, so that text and speech models are evaluated on the same
    items.

    Raises:
        MisfitError: there are no items.
    """
    task, columns = TASKS[name], shards.columns
    rows = [row for row in range(len(columns["id"])) if columns["split"][row] == split and is_item(shards, task, row)]
    if has_audio(shards):
        rows = [row for row in rows if audio_row(shards, task, row) is not None]
    if not rows:
        raise MisfitError(
            f"{shards.folder}: the {split} split has no items for the task {name} (needs {_needs(task)}); set "
            f"tasks.{name} to 0, or choose another split or corpus"
        )
    return [(name, row) for row in rows]


def training_groups(shards: Shards) -> list[str]:
    """Return the groups of sessions in the training split, in an order that their names alone decide."""
    columns = shards.columns
    rows = zip(columns["group"], columns["split"], strict=True)
    return sorted({group for group, split in rows if split == "train"}, key=_digest)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def items_of_share(share: float, shards: Shards, name: str, split: str) -> list[Item]:
    """Return the items of a task in a split; in the training split, those of a share of its groups of sessions.

    Shares are nested: a larger one has all groups of a smaller one. See `items`.

    Raises:
        MisfitError: there are no items.
    """
    found = items(shards, name, split)
    if share == 1 or split != "train":
        return found
    groups, group_of = training_groups(shards), shards.columns["group"]
    kept = set(groups[: max(1, round(share * len(groups)))])
    found = [item for item in found if group_of[item[1]] in kept]
    if not found:
        raise MisfitError(
            f"{shards.folder}: {share:.0%} of the training groups have no items for the task {name}; set "
            "search.fidelity to epochs"
        )
    return found


def _needs(task: Task) -> str:
    what = {"label": "a labelled turn", "text": "a turn with text", "quality": "a session with a quality"}[task.answer]
    role = f" of the {task.role}" if task.role else ""
    return what + role + (" after another turn" if task.reads == "before" else "")


def is_item(shards: Shards, task: Task, row: int) -> bool:
    """Return whether a turn is an item of a task, independent of audio."""
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


def last_row(task: Task, row: int) -> int:
    """Return the row of the last turn that a task may use for an item."""
    return row if task.reads == "turn" else row - 1


def audio_row(shards: Shards, task: Task, row: int) -> int | None:
    """Return the row of the audio turn: the last turn of the dialogue with a clip; None if there is none.

    If the task classifies the turn itself, only the clip of this turn counts.
    """
    last = last_row(task, row)
    first = last if task.answer == "label" and task.reads == "turn" else shards.sessions[row][0]
    samples = shards.columns["n_samples"]
    return next((candidate for candidate in range(last, first - 1, -1) if samples[candidate] > 0), None)


def answer(shards: Shards, item: Item) -> str:
    """Return the expected answer of an item: a label, a text, or a quality."""
    name, row = item
    value: str = shards.columns[TASKS[name].answer][row]
    return value


def vote_targets(shards: Shards, items: Sequence[Item], answers: Sequence[str]) -> list[dict[str, float] | None]:
    """Return for each item the share of each answer among its annotators; None where all of it is the item's answer.

    Args:
        shards: the corpus.
        items: of one task.
        answers: that the task knows; none if its answer is text.
    """
    columns, targets = shards.columns, list[dict[str, float] | None]()
    for name, row in items:
        votes = item_votes(shards, (name, row))
        label = columns["label"][row]
        shares = vote_shares(votes, answers, shards.manifest.roles.get(columns["speaker"][row], ()))
        targets.append(shares if shares and shares != {label: 1.0} else None)
    return targets


def item_votes(shards: Shards, item: Item) -> dict[str, int]:
    """Return the votes of an item's annotators; empty if it has only one, or if its answer is not a label."""
    votes = dict(shards.columns["votes"][item[1]] or ()) if TASKS[item[0]].answer == "label" else {}
    return votes if sum(votes.values()) > 1 else {}


def check_votes(shards: Shards, names: Sequence[str]) -> None:
    """Check that annotators' votes can be trained on: several annotators coded a turn of the training split.

    Args:
        shards: the corpus.
        names: of the tasks.

    Raises:
        MisfitError: there is no such turn; the message counts those of all splits. Or an earlier version prepared the
            corpus, and its votes do not tell which labels an annotator gave together.
    """
    columns, coded = shards.columns, [name for name in names if TASKS[name].answer == "label"]
    training = [item for name in coded for item in items(shards, name, "train")]
    voted = [item for item in training if item_votes(shards, item)]
    for item in voted:
        if counts_labels(columns["label"][item[1]], item_votes(shards, item)):
            raise MisfitError(
                f"{shards.folder}: the votes of turn {columns['id'][item[1]]} do not tell which labels an annotator "
                "gave together, since an earlier version prepared them; prepare the corpus again, or set "
                "train.labels=majority"
            )
    if voted or not coded:
        return
    several = sum(sum(count for _, count in votes or ()) > 1 for votes in columns["votes"])
    raise MisfitError(
        f"{shards.folder}: train.labels=votes needs turns that several annotators coded, and none of the "
        f"{len(training)} training items of {', '.join(coded)} is one (the corpus has {several}); set "
        "train.labels=majority, or prepare the corpus from a table with a row per annotator"
    )


def answer_problems(shards: Shards, names: Sequence[str]) -> list[str]:
    """Return why metrics of some tasks say little about models: answers that are all equal, or that training lacks."""
    problems = []
    for name in names:
        if TASKS[name].answer == "text":
            continue
        counts = dict[str, Counter[str]]()
        for split in SPLITS:
            with contextlib.suppress(MisfitError):  # there are no items
                counts[split] = Counter(answer(shards, item) for item in items(shards, name, split))
        problems += [f"{name}: {problem.message}" for problem in label_problems(counts, "items")]
    return problems


@dataclass(frozen=True)
class AnswerSet:
    """The possible answers of a task and their counts in the training split; both are empty if the answer is text."""

    labels: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


def answer_sets(shards: Shards, names: Sequence[str]) -> dict[str, AnswerSet]:
    """Return the answers of several tasks: labels in order, then the joined labels that occur in the training split.

    Raises:
        MisfitError: the training split has no items for a task.
    """
    return {name: _answer_set(shards, TASKS[name]) for name in names}


def _answer_set(shards: Shards, task: Task) -> AnswerSet:
    counts = Counter(answer(shards, item) for item in items(shards, task.name, "train"))
    if task.answer == "text":
        return AnswerSet()
    manifest = shards.manifest
    allowed = manifest.roles.get(task.role, ()) if task.role else manifest.labels
    singles = manifest.qualities if task.answer == "quality" else tuple(n for n in manifest.labels if n in allowed)
    sets = sorted(label for label in counts if len(split_label(label)) > 1)
    labels = (*singles, *sets)
    return AnswerSet(labels, tuple(counts[label] for label in labels))
