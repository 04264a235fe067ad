"""AnnoMI (Wu et al., ICASSP 2022): one CSV of utterances, optionally one audio file a transcript.

AnnoMI-full has several rows for utterances that several annotators coded; AnnoMI-simple has one row for each. Times are
starts only, in whole seconds: a turn ends where the next one starts.
"""

import re
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError
from data.importers.builder import UNKNOWN, TurnBuilder
from data.importers.recordings import set_recordings
from data.importers.tabular import Row, agreed, by_conversation, read_rows
from data.importers.timestamps import read_time, set_ends

LABELS = {
    "client": ("change", "neutral", "sustain"),
    "therapist": ("other", "question", "reflection", "therapist_input"),
}
LABEL_COLUMN = {"client": "client_talk_type", "therapist": "main_therapist_behaviour"}
QUALITIES = ("high", "low")  # of a session
COLUMNS = ("transcript_id", "mi_quality", "video_url", "utterance_id", "interlocutor", "timestamp", "utterance_text")
SAID = ("interlocutor",)  # text and time are the first row's
ANNOTATOR = "annotator_id"  # AnnoMI-full has it
TIME = re.compile(r"\d\d:\d\d:\d\d")


def read_annomi(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read AnnoMI-simple or AnnoMI-full.

    Args:
        source: the CSV.
        audio: folder with `<transcript_id>.<wav|flac|…>`; None: text only.
        config: settings.

    Raises:
        DataError: the file or a row cannot be read, a session has no quality, an unknown one or two, or there are no
            recordings.
    """
    codes = tuple(LABEL_COLUMN.values())
    needed = (*COLUMNS, *codes) if config.coded else COLUMNS
    rows = read_rows(source, needed, config, optional=(ANNOTATOR, *codes))
    draft = TurnBuilder("annomi", config, {role: role for role in LABELS}, LABELS, QUALITIES)
    sessions = by_conversation(rows, "transcript_id")
    conversations = [_conversation(name, own, draft) for name, own in sessions.items()]
    set_recordings(conversations, audio)
    return draft.corpus(conversations)


def _conversation(name: str, rows: list[Row], draft: TurnBuilder) -> Conversation:
    for row in rows:
        if row["mi_quality"].lower() not in draft.qualities:
            known = ", ".join(draft.qualities)
            raise DataError(f"{row.where}: mi_quality {row['mi_quality']!r} is unknown; known: {known}")
        if not row["utterance_id"].isdecimal() or len(row["utterance_id"]) > 9:
            raise DataError(f"{row.where}: utterance_id {row['utterance_id']!r} is not a whole number")
    quality = (agreed(rows, "mi_quality") or "").lower()
    annotator = ANNOTATOR if ANNOTATOR in rows[0].cells else None
    coded = draft.utterances(rows, lambda row: f"{name}/{row['utterance_id']}", annotator, SAID)
    turns = sorted((_turn(name, own, draft) for _, own in coded), key=lambda turn: turn.index)
    set_ends(turns, draft.findings)
    return Conversation(name, agreed(rows, "video_url") or name, turns, quality=quality)


def _turn(conversation: str, rows: list[Row], draft: TurnBuilder) -> Turn:
    first = rows[0]
    speaker = first["interlocutor"]
    column = LABEL_COLUMN.get(draft.role(speaker, conversation))
    codes = [row[column] for row in rows]
    turn = draft.turn(conversation, first["utterance_id"], speaker, first["utterance_text"], codes, first.where)
    if turn.label is None and turn.speaker != UNKNOWN and draft.config.coded:
        turn.label = ""  # every utterance of AnnoMI has a code: the validation rejects one without
    turn.index = int(first["utterance_id"])
    turn.start = read_time(first["timestamp"], turn, draft.findings, usual=TIME)
    return turn
