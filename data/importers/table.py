"""Any table of turns: the settings say which column holds what."""

import math
from pathlib import Path

from data.corpus.config import ColumnConfig, CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn, is_rejected
from data.errors import ConfigError, DataError
from data.importers.builder import TurnBuilder
from data.importers.recordings import refuse_no_folder, refuse_none, set_recordings, within
from data.importers.tabular import Row, agreed, by_conversation, read_rows
from data.importers.timestamps import read_time, set_ends

# Usual names of times, which are looked for where there is sound and nothing says where a turn is in it.
STARTS = ("start", "t_start", "start_time", "onset", "begin", "from")
ENDS = ("end", "t_end", "end_time", "offset", "stop", "to")
ADVICE = "; say with --set columns.text=NAME which column holds what, null for none"


def read_table(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read a CSV, TSV, JSONL or Parquet file by `config.columns`.

    Args:
        source: the file.
        audio: folder with the recordings; None: text only.
        config: settings.

    Raises:
        ConfigError: there are annotators, and nothing tells which rows are of one utterance.
        DataError: the file or a row cannot be read, rows of a session contradict each other, or there are no
            recordings.
    """
    columns = config.columns
    if columns.annotator is not None and columns.id is None and columns.index is None:
        raise ConfigError("columns.annotator: set columns.id or columns.index too, or no rows are of one utterance")
    named = [name for name in columns.model_dump().values() if name is not None]
    timeless = audio is not None and columns.start is None and columns.clip is None
    usual = _spelt(*STARTS, *ENDS) if timeless else []
    rows = read_rows(source, list(dict.fromkeys(named)), config, usual, advice=ADVICE)
    if audio is not None:
        refuse_no_folder(audio)
    if timeless:
        columns = _with_times(columns, rows[0])
    draft = TurnBuilder("table", config.model_copy(update={"columns": columns}))
    sessions = by_conversation(rows, columns.conversation)
    conversations = [_conversation(name, own, audio, draft) for name, own in sessions.items()]
    if audio is not None and columns.clip is not None:
        refuse_none((turn.clip for one in conversations for turn in one.turns), audio)
    if columns.clip is None or columns.recording is not None:
        files = {name: agreed(own, columns.recording) for name, own in sessions.items()}
        set_recordings(conversations, audio, {name: file for name, file in files.items() if file})
    return draft.corpus(conversations)


def _spelt(*names: str) -> list[str]:
    return [*names, *map(str.capitalize, names)]


def _with_times(columns: ColumnConfig, row: Row) -> ColumnConfig:
    start, end = (next((name for name in _spelt(*names) if name in row.cells), None) for names in (STARTS, ENDS))
    if start is None:
        raise ConfigError(
            "columns.start: --audio is given, and no column says where a turn is in it; name it by --set "
            f"columns.start=NAME (found without: {', '.join(STARTS)}), or files of turns by --set columns.clip=NAME"
        )
    return columns.model_copy(update={"start": start, "end": columns.end or end})


def _conversation(name: str, rows: list[Row], audio: Path | None, draft: TurnBuilder) -> Conversation:
    columns = draft.config.columns
    key = columns.id or columns.index
    keys = {row.where: row.need(key) if key else str(place) for place, row in enumerate(rows)}
    coded = draft.utterances(
        rows,
        lambda row: f"{name}/{keys[row.where]}",
        columns.annotator,
        (columns.speaker, columns.text),
    )
    if columns.index is not None:
        coded.sort(key=lambda pair: _place(pair[1][0], columns.index))
    turns = []
    for index, (_, own) in enumerate(coded):
        turns.append(_turn(name, keys[own[0].where], own, audio, draft))
        turns[-1].index = index
    if columns.start is not None or columns.end is not None or (audio is not None and columns.clip is not None):
        set_ends(turns, draft.findings)
    quality, split = agreed(rows, columns.quality), agreed(rows, columns.split, "F_LEAK_CONVERSATION")
    return Conversation(
        name,
        agreed(rows, columns.video) or name,
        turns,
        quality=quality and quality.lower(),
        people=tuple(dict.fromkeys(row[columns.person] for row in rows if row[columns.person])),
        split=split and split.lower(),
    )


def _place(row: Row, column: str | None) -> float:
    try:
        place = float(row[column])
    except ValueError:
        place = math.nan
    if not math.isfinite(place):
        raise DataError(f"{row.where}: {column} {row[column]!r} is not a number; it says the place in the session")
    return place


def _turn(conversation: str, utterance: str, rows: list[Row], audio: Path | None, draft: TurnBuilder) -> Turn:
    columns, first = draft.config.columns, rows[0]
    codes = [row[columns.label] for row in rows]
    turn = draft.turn(conversation, utterance, first[columns.speaker], first[columns.text], codes, first.where)
    times = (first[columns.start], first[columns.end])
    turn.start, turn.end = (read_time(time, turn, draft.findings, draft.config.time_unit) for time in times)
    if audio is not None and first[columns.clip] and not is_rejected(turn.flags):
        turn.clip = within(audio, first[columns.clip], first.where)
    return turn
