"""Sessions that a model is to code: prepared like a corpus, but nobody gave them labels and nothing is split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.corpus_config import CorpusConfig, SplitConfig
from data.findings import Finding
from data.importers import IMPORTERS
from data.prepare import Run, prepare
from data.schema import Conversation, Corpus, is_rejected
from data.shards import Shards
from data.split import Place
from data.tasks import TASKS, Item, heard_row
from data.validate import TIMELESS, Aligner

SPLIT = "test"  # all of them
UNUSED = ("label", "video", "person", "quality", "split")  # columns that only training needs


def read_sessions(
    kind: str, source: Path, audio: Path | None, config: CorpusConfig, roles: Mapping[str, Sequence[str]]
) -> Corpus:
    """Read sessions in one of the formats of corpora; codes that they have already are not looked at.

    Args:
        kind: of IMPORTERS.
        source: file or folder.
        audio: folder with the recordings; None: text only.
        config: settings, as of a corpus.
        roles: of the corpus that the model was trained on: who may carry which label.

    Raises:
        DataError: the source cannot be used.
    """
    columns = config.columns.model_copy(update=dict.fromkeys(UNUSED))
    corpus = IMPORTERS[kind].read(source, audio, config.model_copy(update={"coded": False, "columns": columns}))
    corpus.roles = {role: tuple(labels) for role, labels in roles.items()}
    corpus.labels = tuple(dict.fromkeys(label for labels in roles.values() for label in labels))
    corpus.declared = True
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
    """The turns that a task can be asked about, in the order of the index.

    Args:
        shards: of `prepare_sessions`.
        name: of a task that gives the turn that it reads a label.
        hears: whether the model needs the turn's clip.
    """
    task, columns = TASKS[name], shards.columns
    return [
        (name, row)
        for row, (label, speaker) in enumerate(zip(columns["label"], columns["speaker"], strict=True))
        if label is not None and task.role in (None, speaker)
        if not hears or heard_row(shards, task, row) is not None
    ]


def why_not(shards: Shards, findings: Sequence[Finding], hears: bool) -> dict[int, str]:
    """By row of the turns that are not codable: the reason, in a few words.

    Args:
        shards: of `prepare_sessions`.
        findings: of their preparation.
        hears: whether the model needs the turn's clip.
    """
    columns, found = shards.columns, {}
    coded = [role for role, labels in shards.manifest.roles.items() if labels]
    told = {finding.utterance: finding for finding in findings if finding.code.startswith("E_")}
    silent = {finding.utterance: finding.message for finding in findings if finding.code in TIMELESS}
    for row, utterance in enumerate(columns["id"]):
        if is_rejected(columns["flags"][row].split()):
            found[row] = told[utterance].message if utterance in told else columns["flags"][row]
        elif columns["label"][row] is None:
            found[row] = f"only the {' and the '.join(coded)} is coded"
        elif hears and not columns["n_samples"][row]:
            found[row] = "no sound: " + silent.get(utterance, "the turn has no recording")
    return found
