"""Importer for coded turns without times: CSV with turn, speaker, text, code and optionally several annotators.

The columns of MI-TAGS as published are recognised: id, Video Title, Turn, Speaker, Text, Code, Annotator and Normalized
Turn. A session is a video.
"""

from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError
from data.importers.base.builder import TurnBuilder, refuse_no_turns
from data.importers.base.sessions import files_of, first_file
from data.importers.base.tabular import Row, by_conversation, columns_of, read_rows

COLUMNS = ("turn", "speaker", "text")
SUFFIXES = (".csv", ".tsv", ".xlsx")
CODE = "code"
ANNOTATOR = "annotator"
SESSION = (
    "conversation",
    "session",
    "video title",
    "video",
)  # names of the column that a file with several sessions has


def read_mi_tags(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read coded turns.

    Args:
        source: a CSV or a folder of them; without a column of SESSION the file name is the session id.
        audio: must be None.
        config: settings.

    Raises:
        DataError: a file or a row cannot be read, or recordings are given.
    """
    if audio is not None:
        raise DataError(
            "mi-tags: the format has no times, so audio cannot be cut; omit --audio, or use the format table"
        )
    paths = files_of(source, SUFFIXES)
    builder = TurnBuilder("mi-tags", config)
    needed = (*COLUMNS, CODE) if config.coded else COLUMNS
    files = {
        path: read_rows(path, needed, config, (*SESSION, ANNOTATOR, CODE), codes=(CODE,), may_be_empty=len(paths) > 1)
        for path in paths
    }
    builder.codes.learn(row[CODE] for rows in files.values() for row in rows)
    conversations = []
    for path, rows in files.items():
        if not rows:
            builder.skip_session(path.stem, path.name)
            continue
        column = next((name for name in SESSION if name in rows[0].cells), None)
        sessions = {path.stem: rows} if column is None else by_conversation(rows, column)
        conversations += [_conversation(name, rows, builder) for name, rows in sessions.items()]
    refuse_no_turns(conversations, source)
    return builder.corpus(conversations)


def is_mi_tags(source: Path) -> bool:
    """Return whether a source has coded turns with numbers, and no times."""
    path = first_file(source, SUFFIXES)
    columns = columns_of(path) if path is not None else frozenset()
    return {*COLUMNS, CODE} <= columns and not columns & {"start", "starttime", "timestamp"}


def _conversation(name: str, rows: list[Row], builder: TurnBuilder) -> Conversation:
    for row in rows:
        if not row["turn"].isdecimal() or len(row["turn"]) > 9:
            raise DataError(f"{row.where}: turn {row['turn']!r} is not a whole number")
    annotator = ANNOTATOR if ANNOTATOR in rows[0].cells else None
    utterances = builder.utterances(rows, lambda row: f"{name}/{row['turn']}", annotator, ("speaker", "text"))
    turns = [_turn(name, votes, builder) for votes in sorted(utterances, key=lambda votes: int(votes[0]["turn"]))]
    for index, turn in enumerate(turns):
        turn.index = index
    return Conversation(name, name, turns)


def _turn(conversation: str, rows: list[Row], builder: TurnBuilder) -> Turn:
    first = rows[0]
    codes = [row[CODE] for row in rows]
    return builder.turn(conversation, first["turn"], first["speaker"], first["text"], codes, first.where)
