"""Read formats with one file per session: a file becomes segments, and segments become the turns of a conversation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError, listed
from data.importers.base.annotations import silence_annotations, spoken_text
from data.importers.base.builder import TurnBuilder, refuse_no_turns
from data.importers.base.recordings import set_recordings
from data.importers.base.timestamps import note_order, read_time, set_ends, start_order


class Segment(NamedTuple):
    """What one speaker says without a break, as its file writes it."""

    where: str  # "file:line", or another place in the file
    speaker: str
    text: str
    start: str = ""  # as written, in `CorpusConfig.time_unit` or [HH:]MM:SS[.fff]; "": unknown
    end: str = ""
    code: str = ""  # cell of the label; "": none


Parser = Callable[[Path, TurnBuilder], list[Segment]]  # raises DataError for a file that cannot be read


def read_sessions(
    builder: TurnBuilder, source: Path, audio: Path | None, suffixes: Sequence[str], parse: Parser
) -> Corpus:
    """Read a file, or all files of a folder, as sessions that are named like their files.

    Args:
        builder: carries the name of the format and the settings.
        source: a file, or a folder with files of these suffixes.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        suffixes: suffixes of the format in lower case; the first one is named in messages.
        parse: returns the segments of a file in any order; those with times are sorted by their start.

    Raises:
        DataError: a file cannot be read, no file has a segment, two files define the same session, or there are no
            recordings.
    """
    paths = files_of(source, suffixes)
    files = {path: parse(path, builder) for path in paths}
    builder.codes.learn(segment.code for segments in files.values() for segment in segments)
    conversations: dict[str, Conversation] = {}
    for path, segments in files.items():
        if not segments and len(files) == 1:
            raise DataError(f"{path.name}:1: no turns; check that it is the transcript of a session")
        if not segments:
            builder.skip_session(path.stem, path.name)
        elif path.stem in conversations:
            first = conversations[path.stem].turns[0].where
            raise DataError(
                f"{path.name}: session {path.stem!r} is already at {first}; rename or remove one of the files"
            )
        else:
            conversations[path.stem] = conversation(path.stem, segments, builder)
    refuse_no_turns(list(conversations.values()), source)
    set_recordings(list(conversations.values()), audio)
    return builder.corpus(conversations.values())


def files_of(source: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the source, or the files of a folder with one of the suffixes, in the order of their names.

    Raises:
        DataError: there is no such file.
    """
    if not source.is_dir():
        return [source]
    paths = sorted(path for path in source.iterdir() if path.suffix.lower() in suffixes)
    if not paths:
        names = listed(path.name for path in source.iterdir())
        raise DataError(
            f"{source}: no {suffixes[0]} files in this folder ({names}); give the folder with one file per session"
        )
    return paths


def first_file(source: Path, suffixes: Sequence[str]) -> Path | None:
    """Return the first file that `files_of` returns; None if there is none with such a suffix."""
    paths = source.iterdir() if source.is_dir() else (source,)
    return min((path for path in paths if path.suffix.lower() in suffixes), default=None)


def conversation(name: str, segments: Sequence[Segment], builder: TurnBuilder) -> Conversation:
    """Return a session whose turns are the segments in the order of their starts; its recording is not set."""
    order = start_order([segment.start for segment in segments], builder.config.time_unit)
    note_order(order, name, [segment.where for segment in segments], builder.findings)
    turns = [_turn(name, index, segments[number], builder) for index, number in enumerate(order)]
    set_ends(turns, builder.findings)
    silence_annotations(turns, builder.findings)
    return Conversation(name, name, turns)


def _turn(name: str, index: int, segment: Segment, builder: TurnBuilder) -> Turn:
    text = spoken_text(segment.text, builder.config)
    turn = builder.turn(name, str(index), segment.speaker, text, [segment.code], segment.where)
    turn.index = index
    times = (segment.start, segment.end)
    turn.start, turn.end = (read_time(time, turn, builder.findings, builder.config.time_unit) for time in times)
    return turn
