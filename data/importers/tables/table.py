"""Importer for any table of turns; the settings `columns.*` name its columns."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from data.corpus.config import ColumnConfig, CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn, is_rejected
from data.errors import ConfigError, DataError
from data.importers.base import workbook
from data.importers.base.builder import TurnBuilder
from data.importers.base.cells import MISSING, MISSING_NAME, clean_code, column_key, speaker_key
from data.importers.base.recordings import (
    inside,
    refuse_missing_folder,
    refuse_no_recordings,
    same_stem,
    set_recordings,
)
from data.importers.base.sessions import files_of, first_file
from data.importers.base.tabular import SUFFIXES, Row, agreed, by_conversation, columns_of, read_rows
from data.importers.base.timestamps import NUMBER, has_decimal_commas, note_order, read_time, set_ends, start_order

# Usual names of time columns, which are tried if there are recordings and no setting names the times of the turns.
STARTS = ("start", "t_start", "start_time", "onset", "begin", "from")
ENDS = ("end", "t_end", "end_time", "offset", "stop", "to")
# Usual names of a column with the number of the turn. It decides the order, as columns.index does.
TURN_NUMBERS = ("turn", "turn_id", "turn_index", "turn_number", "turn_no", "utterance_id", "utterance_index")
FILE, SPLIT = "file", "split"  # columns that are added: the name of the file, and the split that its name says
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
DAYS = 0.1  # s; several turns within it cannot be, but as a fraction of a day it is 2.4 hours
LONG = 36_000  # s; no session has ten hours, all of them in whole minutes


def read_table(
    source: Path, audio: Path | None, config: CorpusConfig, name: str = "table", suffixes: Sequence[str] = SUFFIXES
) -> Corpus:
    """Read a CSV, TSV, JSONL, Parquet or Excel file, or a folder of them, by `config.columns`.

    Args:
        source: the file or folder. A file of a folder without the column of the session is a session with its name;
            the names train, validation and test of files are those of the splits.
        audio: folder with the recordings; None: text only.
        config: settings.
        name: of the format.
        suffixes: of the files of a folder that are read.

    Raises:
        ConfigError: there are annotators, and no column identifies the utterance; or recordings without times.
        DataError: the file or a row cannot be read, rows of a session contradict each other, or there are no
            recordings.
    """
    columns = config.columns
    if columns.annotator is not None and columns.id is None and columns.index is None:
        raise ConfigError(
            "columns.annotator: also set columns.id or columns.index, which identify the rows of one utterance"
        )
    timeless = audio is not None and columns.start is None and columns.clip is None
    usual = _spellings(*STARTS, *ENDS) if timeless else []
    optional = [*usual, *(TURN_NUMBERS if columns.index is None else ())]
    columns, rows = _read(source, config, optional, suffixes)
    if audio is not None:
        refuse_missing_folder(audio)
    if timeless:
        columns = _with_times(columns, rows[0])
    assert columns.conversation is not None
    _convert_times(rows, columns, config)
    builder = TurnBuilder(name, config.model_copy(update={"columns": columns}))
    builder.codes.learn(row[columns.label] for row in rows)
    sessions = by_conversation(rows, columns.conversation)
    conversations = [_conversation(name, rows, audio, builder) for name, rows in sessions.items()]
    if audio is not None and columns.clip is not None:
        refuse_no_recordings((turn.clip for conversation in conversations for turn in conversation.turns), audio)
    if columns.clip is None or columns.recording is not None:
        named: dict[str, str] = {}
        for conversation in conversations:
            file = _recording(sessions[conversation.id], conversation, audio, builder)
            named.update({conversation.id: file} if file else {})
        set_recordings(conversations, audio, builder, named)
    return builder.corpus(conversations)


def is_table(source: Path) -> bool:
    """Return whether a source is a table, or a folder of tables."""
    path = first_file(source, SUFFIXES)
    return path is not None and len(columns_of(path)) > 1


def _read(
    source: Path, config: CorpusConfig, optional: Sequence[str], suffixes: Sequence[str]
) -> tuple[ColumnConfig, list[Row]]:
    """Return the rows of all files, and the columns, of which those of session and split may be added to the rows.

    Raises:
        DataError: a file cannot be read, or two files are the same session.
    """
    paths, columns = files_of(source, suffixes), config.columns
    session, optional, part_of = columns.conversation or FILE, list(optional), _splits(paths)
    named = [name for name in columns.model_dump().values() if name not in (None, columns.conversation)]
    book = source.suffix.lower() in workbook.SUFFIXES and source.is_file()
    header = columns_of(paths[0], config.encoding, named) if source.is_dir() or book else frozenset()
    parts = source.is_dir() or (book and workbook.SHEET in header)  # each of them may be a session
    by_file = columns.conversation is None or (parts and column_key(columns.conversation) not in header)
    if not by_file:
        named.append(session)
    keys = {name: key for key, name in columns.model_dump().items()}
    rows: list[Row] = []
    files: dict[str, Path] = {}
    for path in paths:
        read = read_rows(
            path,
            list(dict.fromkeys(named)),
            config,
            [*optional, *([workbook.SHEET] if by_file and path.suffix.lower() in workbook.SUFFIXES else ())],
            advice=lambda missing: f"; name it with --set columns.{keys[missing]}=NAME, or null if there is none",
            codes=[columns.label],
            clips=[columns.clip],
            may_be_empty=len(paths) > 1,
        )
        if by_file and read:
            first = files.setdefault(path.stem, path)
            if first != path:
                raise DataError(f"{path}: session {path.stem!r} is already {first}; rename or remove one of the files")
        for row in read:
            row.cells.update({session: _session(path, row, source)} if by_file else {})
            row.cells.update({SPLIT: part_of[path]} if part_of else {})
        rows += read
    if not rows:
        raise DataError(f"{source}: no rows; check the path of the source")
    added = {"conversation": session} | ({"split": columns.split or SPLIT} if part_of else {})
    return columns.model_copy(update=added), rows


def _session(path: Path, row: Row, source: Path) -> str:
    """Return the session of a row whose file or sheet is a session."""
    sheet = row[workbook.SHEET] if path.suffix.lower() in workbook.SUFFIXES else ""
    return " ".join(filter(None, (path.stem if source.is_dir() or not sheet else "", sheet)))


def _splits(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the split of each file if all of several are named like splits, also in parts (train-00000-of-00002)."""
    words = {path: re.split(r"[-_.]\d", path.stem.lower())[0] for path in paths}
    names = {path: SPLITS.get(word) or SPLITS.get(path.parent.name.lower(), "") for path, word in words.items()}
    return names if len(set(names.values())) > 1 and all(names.values()) else {}


def _recording(rows: list[Row], conversation: Conversation, audio: Path | None, builder: TurnBuilder) -> str | None:
    """Return the file of a session, or set the recordings of its turns if each speaker has one.

    Raises:
        DataError: a speaker has two files.
    """
    columns, files = builder.config.columns, dict[str, str]()
    of_speaker: dict[str, list[Row]] = {}
    for row in rows:
        of_speaker.setdefault(speaker_key(row[columns.speaker]), []).append(row)
    if builder.config.recordings == "session":
        of_speaker = {"": rows}
    for speaker, spoken in of_speaker.items():
        if file := agreed(spoken, columns.recording):
            files[speaker] = file
    if len(set(files.values())) < 2 or audio is None:
        return next(iter(files.values()), None)
    for turn in conversation.turns:
        named = files.get(speaker_key(builder.names[turn.id]))
        if named is not None and not is_rejected(turn.flags):
            turn.recording = same_stem(inside(audio, named, turn.where))
    return None


def _spellings(*names: str) -> list[str]:
    return [*names, *map(str.capitalize, names)]


def _with_times(columns: ColumnConfig, row: Row) -> ColumnConfig:
    start, end = (next((name for name in _spellings(*names) if name in row.cells), None) for names in (STARTS, ENDS))
    if start is None:
        raise ConfigError(
            "columns.start: --audio is given, but no column has start times; name it with --set columns.start=NAME "
            f"(recognised names: {', '.join(STARTS)}), or name a column of audio files with --set columns.clip=NAME"
        )
    return columns.model_copy(update={"start": start, "end": columns.end or end})


def _convert_times(rows: list[Row], columns: ColumnConfig, config: CorpusConfig) -> None:
    """Write decimal commas as points.

    Raises:
        DataError: the times are fractions of a day, which must be said, or hours where minutes are meant.
    """
    named = [column for column in (columns.start, columns.end) if column is not None]
    stamps = [row[column] for row in rows for column in named if row[column]]
    if has_decimal_commas(stamps):
        for row in rows:
            row.cells.update({column: row[column].replace(",", ".") for column in named})
        return
    _refuse_hours(rows[0].where, stamps)
    days = all(re.fullmatch(NUMBER, stamp) and 0 <= float(stamp) < DAYS for stamp in stamps)
    if days and config.time_unit == "s" and columns.clip is None and len(stamps) > 3:
        raise DataError(
            f"{rows[0].where}: all times are below {DAYS} s, so they seem to be fractions of a day, as Excel stores "
            "them; set --set time_unit=d"
        )


def _refuse_hours(where: str, stamps: Sequence[str]) -> None:
    """Raise a DataError for whole minutes up to many hours: Excel takes 12:30 for 12 hours and 30 minutes."""
    clocks = [re.fullmatch(r"(\d{1,3}):(\d\d):00", stamp) for stamp in stamps]
    if len(stamps) < 4 or not any(clocks):
        return
    seconds = [
        int(clock[1]) * 3600 + int(clock[2]) * 60 if clock else float(stamp) if re.fullmatch(NUMBER, stamp) else 1.0
        for clock, stamp in zip(clocks, stamps, strict=True)
    ]
    if max(seconds) >= LONG and all(second % 60 == 0 for second in seconds):
        raise DataError(
            f"{where}: all times are whole minutes, up to {max(seconds) / 3600:.0f} hours, so they seem to be minutes "
            "and seconds that Excel took for hours and minutes; divide these columns by 60 in Excel"
        )


def _conversation(name: str, rows: list[Row], audio: Path | None, builder: TurnBuilder) -> Conversation:
    columns = builder.config.columns
    key = columns.id or columns.index
    keys = {row.where: row.need(key) if key else str(index) for index, row in enumerate(rows)}
    utterances = builder.utterances(
        rows, lambda row: f"{name}/{keys[row.where]}", columns.annotator, (columns.speaker, columns.text)
    )
    if columns.index is not None:
        utterances.sort(key=lambda votes: _position(votes[0], columns.index))
    else:
        utterances = _in_order(name, utterances, key, builder)
        if key is None:  # a turn without id is called by its position
            keys = {votes[0].where: str(index) for index, votes in enumerate(utterances)}
    turns = []
    for index, votes in enumerate(utterances):
        turns.append(_turn(name, keys[votes[0].where], votes, audio, builder))
        turns[-1].index = index
    if columns.start is not None or columns.end is not None or (audio is not None and columns.clip is not None):
        set_ends(turns, builder.findings)
    quality, split = agreed(rows, columns.quality), agreed(rows, columns.split, "F_LEAK_CONVERSATION")
    return Conversation(
        name,
        agreed(rows, columns.video) or name,
        turns,
        quality=None if quality is None or clean_code(quality) in MISSING else quality.lower(),
        people=tuple(
            dict.fromkeys(person for row in rows if (person := row[columns.person]) and person not in MISSING_NAME)
        ),
        split=split and split.lower(),
    )


def _in_order(conversation: str, utterances: list[list[Row]], key: str | None, builder: TurnBuilder) -> list[list[Row]]:
    """Return the utterances in the order of their turn numbers, else of their starts, else as they are."""
    columns, first = builder.config.columns, [votes[0] for votes in utterances]
    number = next((name for name in TURN_NUMBERS if name in first[0].cells), None)
    numbers = [float(row[number]) for row in first if re.fullmatch(NUMBER, row[number])]
    if len(set(numbers)) == len(first):  # else they count something else, such as the turns of a speaker
        order = sorted(range(len(first)), key=numbers.__getitem__)
    elif columns.start is not None:
        order = start_order([row[columns.start] for row in first], builder.config.time_unit)
    else:
        return utterances
    firsts: dict[str, int] = {}  # a duplicate row is dropped, wherever it is
    for row in order:
        firsts.setdefault(first[row][key] if key is not None else str(row), row)
    kept = list(firsts.values())
    ranks = {row: rank for rank, row in enumerate(sorted(kept))}
    note_order([ranks[row] for row in kept], conversation, [first[row].where for row in sorted(kept)], builder.findings)
    return [utterances[row] for row in order]


def _position(row: Row, column: str | None) -> float:
    try:
        position = float(row[column])
    except ValueError:
        position = math.nan
    if not math.isfinite(position):
        raise DataError(
            f"{row.where}: {column} {row[column]!r} is not a number; it must be the position in the session"
        )
    return position


def _turn(conversation: str, utterance: str, rows: list[Row], audio: Path | None, builder: TurnBuilder) -> Turn:
    columns, first = builder.config.columns, rows[0]
    codes = [row[columns.label] for row in rows]
    turn = builder.turn(conversation, utterance, first[columns.speaker], first[columns.text], codes, first.where)
    times = (first[columns.start], first[columns.end])
    turn.start, turn.end = (read_time(time, turn, builder.findings, builder.config.time_unit) for time in times)
    if columns.clip in first.stored and not is_rejected(turn.flags):
        turn.clip = first.stored[columns.clip]
        return turn
    has_clip = first[columns.clip] and first[columns.clip] not in MISSING_NAME
    if audio is not None and has_clip and not is_rejected(turn.flags):
        turn.clip = same_stem(inside(audio, first[columns.clip], first.where))
    return turn
