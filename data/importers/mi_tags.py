"""Coded turns without times, perhaps by several annotators: CSV with turn, speaker, text, code and annotator."""

from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError
from data.importers.builder import TurnBuilder
from data.importers.tabular import Row, by_conversation, read_rows

COLUMNS = ("turn", "speaker", "text")
CODE = "code"
ANNOTATOR = "annotator"
SESSION = ("conversation", "session")  # columns that a file of several sessions has


def read_mi_tags(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read coded turns.

    Args:
        source: a CSV, or a folder of them; without a column `conversation` or `session` a session is called like its
            file.
        audio: must be None.
        config: settings.

    Raises:
        DataError: a file or a row cannot be read, or there are recordings.
    """
    if audio is not None:
        raise DataError("mi-tags: the format has no times, so no sound can be cut; leave --audio out, or use table")
    paths = sorted(source.glob("*.[ct]sv")) if source.is_dir() else [source]
    if not paths:
        raise DataError(f"{source}: no CSV files; give the folder that holds one a session")
    draft = TurnBuilder("mi-tags", config)
    conversations = []
    for path in paths:
        needed = (*COLUMNS, CODE) if config.coded else COLUMNS
        rows = read_rows(path, needed, config, optional=(*SESSION, ANNOTATOR, CODE))
        column = next((name for name in SESSION if name in rows[0].cells), None)
        sessions = {path.stem: rows} if column is None else by_conversation(rows, column)
        conversations += [_conversation(name, own, draft) for name, own in sessions.items()]
    return draft.corpus(conversations)


def _conversation(name: str, rows: list[Row], draft: TurnBuilder) -> Conversation:
    for row in rows:
        if not row["turn"].isdecimal() or len(row["turn"]) > 9:
            raise DataError(f"{row.where}: turn {row['turn']!r} is not a whole number")
    annotator = ANNOTATOR if ANNOTATOR in rows[0].cells else None
    coded = draft.utterances(rows, lambda row: f"{name}/{row['turn']}", annotator, ("speaker", "text"))
    turns = []
    for index, (_, own) in enumerate(sorted(coded, key=lambda pair: int(pair[1][0]["turn"]))):
        turns.append(_turn(name, own, draft))
        turns[-1].index = index
    return Conversation(name, name, turns)


def _turn(conversation: str, rows: list[Row], draft: TurnBuilder) -> Turn:
    first = rows[0]
    codes = [row[CODE] for row in rows]
    return draft.turn(conversation, first["turn"], first["speaker"], first["text"], codes, first.where)
