"""Sessions that a model is to code: prepared like a corpus, but nobody gave them labels and nothing is split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.corpus.config import CorpusConfig, SplitConfig
from data.corpus.issues import Finding
from data.corpus.schema import Conversation, Corpus, is_rejected
from data.importers import IMPORTERS
from data.loading.tasks import TASKS, Item, Task, heard_row, is_item
from data.preparation.build import Run, prepare
from data.preparation.split import Place
from data.preparation.validate import TIMELESS, Aligner
from data.shards.dataset import Shards

SPLIT = "test"  # all of them
UNUSED = ("label", "video", "person", "quality", "split")  # columns that only training needs


def read_sessions(
    kind: str,
    source: Path,
    audio: Path | None,
    config: CorpusConfig,
    roles: Mapping[str, Sequence[str]],
    qualities: Sequence[str] = (),
) -> Corpus:
    """Read sessions in one of the formats of corpora; codes that they have already are not looked at.

    Args:
        kind: of IMPORTERS.
        source: file or folder.
        audio: folder with the recordings; None: text only.
        config: settings, as of a corpus.
        roles: of the corpus that the model was trained on: who may carry which label.
        qualities: that it gives to sessions; none: it does not rate them.

    Raises:
        DataError: the source cannot be used.
    """
    columns = config.columns.model_copy(update=dict.fromkeys(UNUSED))
    corpus = IMPORTERS[kind].read(source, audio, config.model_copy(update={"coded": False, "columns": columns}))
    corpus.roles = {role: tuple(labels) for role, labels in roles.items()}
    corpus.labels = tuple(dict.fromkeys(label for labels in roles.values() for label in labels))
    corpus.declared, corpus.qualities = True, tuple(qualities)
    for one in corpus.conversations:
        one.quality = next(iter(qualities), None)  # any, as with labels below
    for turn in (turn for one in corpus.conversations for turn in one.turns):
        # Any label makes a turn an item; which one it is, no score depends on.
        own = corpus.roles.get(turn.speaker, ())
        turn.label, turn.votes = (own[0] if own and not is_rejected(turn.flags) else None), {}
    return corpus


def prepare_sessions(corpus: Corpus, out: Path, config: CorpusConfig, align: Aligner | None, run: Run) -> Shards:
    """Write what `read_sessions` returned as shards. Rows that are rejected stay, and say why; see `prepare`."""
    settings = config.model_copy(update={"max_rejected": 1.0, "split": SplitConfig()})
    return prepare(corpus, out, settings, align=align, run=run, deal=_undivided)


def _undivided(conversations: Sequence[Conversation], config: SplitConfig, **_: Any) -> dict[str, Place]:
    return {one.id: Place(one.group, SPLIT) for one in conversations}


def codable(shards: Shards, name: str, hears: bool) -> list[Item]:
    """What a task can be asked about, in the order of the index: turns, or the last turns of sessions that are rated.

    Args:
        shards: of `prepare_sessions`.
        name: of the task.
        hears: whether the model needs a clip.
    """
    task, flags = TASKS[name], shards.columns["flags"]
    return [
        (name, row)
        for row in range(len(flags))
        if is_item(shards, task, row) and (task.answer == "quality" or not is_rejected(flags[row].split()))
        if not hears or heard_row(shards, task, row) is not None
    ]


def why_not(shards: Shards, findings: Sequence[Finding], names: Sequence[str], hears: bool) -> dict[int, str]:
    """By row of the turns that no task can be asked about: the reason, in a few words.

    Args:
        shards: of `prepare_sessions`.
        findings: of their preparation.
        names: of the tasks.
        hears: whether the model needs a clip.
    """
    columns, found = shards.columns, {}
    tasks = [TASKS[name] for name in names if TASKS[name].answer != "quality"]
    asked = {row for task in tasks for _, row in codable(shards, task.name, hears)}
    told = {finding.utterance: finding for finding in findings if finding.code.startswith("E_")}
    silent = {finding.utterance: finding.message for finding in findings if finding.code in TIMELESS}
    for row, utterance in enumerate(columns["id"]):
        known = [task for task in tasks if is_item(shards, task, row)]
        if is_rejected(columns["flags"][row].split()):
            found[row] = told[utterance].message if utterance in told else columns["flags"][row]
        elif row not in asked and any(task.reads == "turn" for task in known):
            found[row] = "no sound: " + silent.get(utterance, "the turn has no recording")
        elif row not in asked:
            found[row] = "no sound: no turn before it has a recording" if known else _unasked(shards, tasks, row)
    return found


def _unasked(shards: Shards, tasks: Sequence[Task], row: int) -> str:
    """Why a turn is no item of any task."""
    if not tasks:
        return "only whole sessions are rated"
    labelled = any(task.answer == "label" for task in tasks)
    roles = [role for role, labels in shards.manifest.roles.items() if labels]
    if labelled and shards.columns["label"][row] is None:
        return f"only the {' and the '.join(roles)} is coded"
    if not labelled and shards.columns["speaker"][row] not in {task.role for task in tasks}:
        return f"only replies of the {tasks[0].role} are written"
    if row == shards.sessions[row][0]:
        return "nothing comes before it"
    return "it is no reply: it has no words, or the same speaker goes on"
