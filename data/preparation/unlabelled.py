"""Prepare sessions that a model will code: like a corpus, but without labels and without a split."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.corpus.config import CorpusConfig, SplitConfig
from data.corpus.issues import Finding
from data.corpus.schema import Conversation, Corpus, is_rejected
from data.importers import IMPORTERS
from data.loading.tasks import TASKS, Item, Task, audio_row, is_item
from data.preparation.build import Run, prepare
from data.preparation.split import Assignment, Pairs, Part
from data.preparation.validate import TIMELESS, Aligner
from data.shards.dataset import Shards

SPLIT = "test"  # split of all sessions
UNUSED = ("label", "video", "person", "quality", "split")  # columns that are only needed for training


def read_sessions(
    kind: str,
    source: Path,
    audio: Path | None,
    config: CorpusConfig,
    roles: Mapping[str, Sequence[str]],
    qualities: Sequence[str] = (),
) -> Corpus:
    """Read sessions in one of the corpus formats. Existing codes are ignored.

    Args:
        kind: key of IMPORTERS.
        source: file or folder.
        audio: folder with the recordings; None: text only.
        config: settings, as for a corpus.
        roles: role → labels it may have, of the corpus that the model was trained on.
        qualities: quality labels that the model assigns to sessions; empty: it does not rate them.

    Raises:
        DataError: the source cannot be used.
    """
    columns = config.columns.model_copy(update=dict.fromkeys(UNUSED))
    corpus = IMPORTERS[kind].read(
        source, audio, config.model_copy(update={"coded": False, "columns": columns, "codebook": None})
    )
    corpus.roles = {role: tuple(labels) for role, labels in roles.items()}
    corpus.labels = tuple(dict.fromkeys(label for labels in roles.values() for label in labels))
    corpus.declared, corpus.qualities = True, tuple(qualities)
    for conversation in corpus.conversations:
        conversation.quality = next(iter(qualities), None)  # a placeholder, as the labels below
        for turn in conversation.turns:
            # A turn needs a label to become an item of a task. Its value has no effect on the predictions.
            labels = corpus.roles.get(turn.speaker, ())
            turn.label, turn.votes = (labels[0] if labels and not is_rejected(turn.flags) else None), {}
    return corpus


def prepare_sessions(corpus: Corpus, out: Path, config: CorpusConfig, align: Aligner | None, run: Run) -> Shards:
    """Write the result of `read_sessions` as shards; any number of rows may be rejected. See `prepare`."""
    settings = config.model_copy(update={"max_rejected": 1.0, "split": SplitConfig(), "codebook": None})
    return prepare(corpus, out, settings, align=align, run=run, split=_assign_all)


def _assign_all(
    conversations: Sequence[Conversation],
    config: SplitConfig,
    *,
    before: Mapping[str, Part] = {},
    shared: Pairs = (),
) -> dict[str, Assignment]:
    return {conversation.id: Assignment(conversation.group, SPLIT) for conversation in conversations}


def codable_items(shards: Shards, name: str, uses_audio: bool) -> list[Item]:
    """Return the items of a task in the order of the index: turns, or the last turn of each session for quality tasks.

    Args:
        shards: the result of `prepare_sessions`.
        name: name of the task.
        uses_audio: whether the model needs a clip.
    """
    task, flags = TASKS[name], shards.columns["flags"]
    return [
        (name, row)
        for row in range(len(flags))
        if is_item(shards, task, row) and (task.answer == "quality" or not is_rejected(flags[row].split()))
        if not uses_audio or audio_row(shards, task, row) is not None
    ]


def reasons_not_coded(
    shards: Shards, findings: Sequence[Finding], names: Sequence[str], uses_audio: bool
) -> dict[int, str]:
    """Return the reason, in a few words, for every row that is not an item of any task.

    Args:
        shards: the result of `prepare_sessions`.
        findings: findings of the preparation.
        names: names of the tasks.
        uses_audio: whether the model needs a clip.
    """
    columns, reasons = shards.columns, {}
    tasks = [TASKS[name] for name in names if TASKS[name].answer != "quality"]
    items = {row for task in tasks for _, row in codable_items(shards, task.name, uses_audio)}
    errors = {finding.utterance: finding.message for finding in findings if finding.code.startswith("E_")}
    timeless = {finding.utterance: finding.message for finding in findings if finding.code in (*TIMELESS, "W_NO_WORDS")}
    for row, utterance in enumerate(columns["id"]):
        candidates = [task for task in tasks if is_item(shards, task, row)]
        if is_rejected(columns["flags"][row].split()):
            reasons[row] = errors.get(utterance, columns["flags"][row])
        elif row not in items and "W_TEXT_EMPTY" in columns["flags"][row].split():
            reasons[row] = "the turn has neither text nor audio"
        elif row not in items and any(task.reads == "turn" for task in candidates):
            reasons[row] = "no audio: " + timeless.get(utterance, "the turn has no recording")
        elif row not in items and candidates:
            reasons[row] = "no audio: no turn before it has a recording"
        elif row not in items:
            reasons[row] = _reason_no_item(shards, tasks, row)
    return reasons


def _reason_no_item(shards: Shards, tasks: Sequence[Task], row: int) -> str:
    if not tasks:
        return "only whole sessions are rated"
    labelled = any(task.answer == "label" for task in tasks)
    roles = [role for role, labels in shards.manifest.roles.items() if labels]
    if labelled and shards.columns["label"][row] is None:
        return f"only turns of the {' and the '.join(roles)} are coded"
    if not labelled and shards.columns["speaker"][row] not in {task.role for task in tasks}:
        return f"only replies of the {tasks[0].role} are written"
    if row == shards.sessions[row][0]:
        return "no turn comes before it"
    return "the turn is not a reply: it has no text, or the previous turn has the same speaker"
