"""Importer for AnnoMI (Wu et al., ICASSP 2022): one CSV of utterances, optionally one audio file per transcript.

AnnoMI-full has several rows for an utterance that several annotators coded; AnnoMI-simple has one row per utterance.
It gives start times only, in whole seconds: a turn ends at the start of the next one.
"""

import re
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError
from data.importers.base.builder import UNKNOWN, TurnBuilder
from data.importers.base.cells import column_key
from data.importers.base.recordings import set_recordings
from data.importers.base.tabular import Row, agreed, by_conversation, columns_of, read_rows
from data.importers.base.timestamps import read_time, set_ends

LABELS = {
    "client": ("change", "neutral", "sustain"),
    "therapist": ("other", "question", "reflection", "therapist_input"),
}
LABEL_COLUMN = {"client": "client_talk_type", "therapist": "main_therapist_behaviour"}
QUALITIES = ("high", "low")  # of a session
COLUMNS = ("transcript_id", "mi_quality", "video_url", "utterance_id", "interlocutor", "timestamp", "utterance_text")
SHARED = ("interlocutor",)  # annotators must agree on it; text and time are those of the first row
ANNOTATOR = "annotator_id"  # only in AnnoMI-full
TIME = re.compile(r"\d\d:\d\d:\d\d")


def read_annomi(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read AnnoMI-simple or AnnoMI-full.

    Args:
        source: the CSV.
        audio: folder with `<transcript_id>.<wav|flac|…>`; None: text only.
        config: settings.

    Raises:
        DataError: the file or a row cannot be read, a session has no quality, an unknown one or two of them, or there
            are no recordings.
    """
    codes = tuple(LABEL_COLUMN.values())
    needed = (*COLUMNS, *codes) if config.coded else COLUMNS
    rows = read_rows(source, needed, config, optional=(ANNOTATOR, *codes))
    builder = TurnBuilder("annomi", config, {role: role for role in LABELS}, LABELS, QUALITIES)
    sessions = by_conversation(rows, "transcript_id")
    conversations = [_conversation(name, rows, builder) for name, rows in sessions.items()]
    set_recordings(conversations, audio, builder)
    return builder.corpus(conversations)


def is_annomi(source: Path) -> bool:
    """Return whether a source has the columns of AnnoMI."""
    return source.is_file() and set(map(column_key, COLUMNS)) <= columns_of(source)


def _conversation(name: str, rows: list[Row], builder: TurnBuilder) -> Conversation:
    for row in rows:
        if row["mi_quality"].lower() not in builder.qualities:
            allowed = ", ".join(builder.qualities)
            raise DataError(f"{row.where}: mi_quality {row['mi_quality']!r} is unknown; use one of {allowed}")
        if not row["utterance_id"].isdecimal() or len(row["utterance_id"]) > 9:
            raise DataError(f"{row.where}: utterance_id {row['utterance_id']!r} is not a whole number")
    quality = (agreed(rows, "mi_quality") or "").lower()
    annotator = ANNOTATOR if ANNOTATOR in rows[0].cells else None
    utterances = builder.utterances(rows, lambda row: f"{name}/{row['utterance_id']}", annotator, SHARED)
    turns = sorted((_turn(name, votes, builder) for votes in utterances), key=lambda turn: turn.index)
    set_ends(turns, builder.findings)
    return Conversation(name, agreed(rows, "video_url") or name, turns, quality=quality)


def _turn(conversation: str, rows: list[Row], builder: TurnBuilder) -> Turn:
    first = rows[0]
    speaker = first["interlocutor"]
    column = LABEL_COLUMN.get(builder.role(speaker, conversation))
    codes = [row[column] for row in rows]
    turn = builder.turn(conversation, first["utterance_id"], speaker, first["utterance_text"], codes, first.where)
    if turn.label is None and turn.speaker != UNKNOWN and builder.config.coded:
        turn.label = ""  # every utterance of AnnoMI has a code; the validation rejects an empty one
    turn.index = int(first["utterance_id"])
    turn.start = read_time(first["timestamp"], turn, builder.findings, usual=TIME)
    return turn
