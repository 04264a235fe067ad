"""Read formats with one file per session: a file becomes segments, and segments become the turns of a conversation."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.corpus.issues import Finding
from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError, listed
from data.importers.base.annotations import silence_annotations, spoken_text
from data.importers.base.builder import TurnBuilder, refuse_no_turns
from data.importers.base.cells import clean_name
from data.importers.base.recordings import recordings_by_name, set_recordings
from data.importers.base.timestamps import note_order, read_time, set_ends, start_order


class Segment(NamedTuple):
    """What one speaker says without a break, as its file writes it."""

    where: str  # "file:line", or another place in the file
    speaker: str
    text: str
    start: str | float = ""  # as written, in `CorpusConfig.time_unit` or [HH:]MM:SS[.fff]; a number: s; "": unknown
    end: str | float = ""
    code: str = ""  # cell of the label; "": none
    session: str = ""  # "": that of the file
    recording: str = ""  # file that the source names, for sessions whose recording is not named like them


class OtherFormatError(DataError):
    """A file of a folder is not of the format, such as settings beside transcripts."""


Parser = Callable[[Path, TurnBuilder], list[Segment]]  # raises DataError for a file that cannot be read


def read_sessions(
    builder: TurnBuilder, source: Path, audio: Path | None, suffixes: Sequence[str], parse: Parser
) -> Corpus:
    """Read a file, or all files of a folder, as sessions that are named like their files.

    Args:
        builder: carries the name of the format and the settings.
        source: a file, or a folder with files of these suffixes. Files in folders of their own that have equal names,
            such as a1/transcript.json, are named like these folders.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        suffixes: suffixes of the format in lower case; the first one is named in messages.
        parse: returns the segments of a file in any order; those with times are sorted by their start.

    Raises:
        DataError: a file cannot be read, no file has a segment, two files define the same session, or there are no
            recordings.
    """
    files = _parsed(builder, source, suffixes, parse)
    builder.codes.learn(segment.code for segments in files.values() for segment in segments)
    conversations: dict[str, Conversation] = {}
    names = _names(files, source)
    for path, segments in files.items():
        if not segments and len(files) == 1:
            raise DataError(f"{path.name}:1: no turns; check that it is the transcript of a session")
        if not segments:
            builder.skip_session(names[path], path.name)
        sessions: dict[str, list[Segment]] = {}
        for segment in segments:
            sessions.setdefault(segment.session or names[path], []).append(segment)
        for name, said in sessions.items():
            if name in conversations:
                first = conversations[name].turns[0].where
                raise DataError(f"{path.name}: session {name!r} is already at {first}; rename or remove a file")
            has_times = any(segment.start != "" for segment in said)
            conversations[name] = conversation(name, said, builder, timed=has_times or audio is not None)
    refuse_no_turns(list(conversations.values()), source)
    set_recordings(list(conversations.values()), audio, builder, _named(files, names, audio))
    return builder.corpus(conversations.values())


def _named(files: Mapping[Path, Sequence[Segment]], names: Mapping[Path, str], audio: Path | None) -> dict[str, str]:
    """Return the recordings that the source names, of sessions without one of their own name in the folder."""
    there = recordings_by_name(audio) if audio is not None else {}
    named: dict[str, str] = {}
    for path, segments in files.items():
        for segment in segments:
            session, name = segment.session or names[path], segment.recording.replace("\\", "/").rpartition("/")[2]
            found = there.get(clean_name(PurePosixPath(name).stem if "." in name else name))
            if name and found is not None and clean_name(session) not in there:
                named.setdefault(session, found.name)  # found by its name: the path is that of another machine
    return named


def _parsed(builder: TurnBuilder, source: Path, suffixes: Sequence[str], parse: Parser) -> dict[Path, list[Segment]]:
    """Return the segments of all files, with findings about those that are something else.

    Files in folders count if those in the folder itself are all something else.
    """
    files, others = dict[Path, list[Segment]](), dict[Path, OtherFormatError]()
    deeper = _levels(source, suffixes)[1:] if source.is_dir() else []
    for paths in (files_of(source, suffixes), *deeper):
        if files:
            break
        for path in paths:
            if path.is_file() and not path.stat().st_size:
                raise DataError(f"{path.name}: the file is empty; check the path of the source")
            try:
                files[path] = parse(path, builder)
            except OtherFormatError as error:
                others[path] = error
    if not files:
        raise next(iter(others.values()))
    for path, other in others.items():
        builder.findings.append(Finding("W_FILE_OTHER", path.name, path.stem, str(other).partition("; ")[0]))
    return files


def _names(paths: Iterable[Path], source: Path) -> dict[Path, str]:
    """Return the sessions of files: their names, or those of their folders where several files have one name."""
    paths = list(paths)
    counts = Counter(path.stem for path in paths)
    return {path: path.parent.name if counts[path.stem] > 1 and path.parent != source else path.stem for path in paths}


def files_of(source: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the source, or the files of a folder with one of the suffixes, in the order of their names.

    Files in the folder itself come first; only without any, those of its folders are taken.

    Raises:
        DataError: there is no such file.
    """
    if not source.is_dir():
        return [source]
    levels = _levels(source, suffixes)
    if not levels:
        names = listed(path.name for path in source.iterdir())
        raise DataError(
            f"{source}: no {suffixes[0]} files in this folder ({names}); give the folder with one file per session"
        )
    return levels[0]


def first_file(source: Path, suffixes: Sequence[str]) -> Path | None:
    """Return the first file that `files_of` returns; None if there is none with such a suffix."""
    return next(iter(first_files(source, suffixes, 1)), None)


def first_files(source: Path, suffixes: Sequence[str], most: int = 10) -> list[Path]:
    """Return the first files with such a suffix of a folder, and of its folders: one of them may be typical."""
    if source.is_dir():
        return [path for paths in _levels(source, suffixes) for path in paths[:most]]
    return [source] if source.suffix.lower() in suffixes else []


def _levels(folder: Path, suffixes: Sequence[str]) -> list[list[Path]]:
    """Return the files in the folder itself, and those in its folders; without empty lists and hidden files."""
    levels: list[list[Path]] = [[], []]
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "~$")) or part == "__MACOSX" for part in inner)
        if path.suffix.lower() in suffixes and not hidden and path.is_file():
            levels[len(inner) > 1].append(path)
    return [paths for paths in levels if paths]


def conversation(name: str, segments: Sequence[Segment], builder: TurnBuilder, timed: bool = True) -> Conversation:
    """Return a session whose turns are the segments in the order of their starts; its recording is not set.

    Args:
        name: id of the session.
        segments: what is said in it.
        builder: of the corpus.
        timed: whether turns without times are worth a finding.
    """
    unit = "s" if any(isinstance(segment.start, float) for segment in segments) else builder.config.time_unit
    order = start_order([str(segment.start) for segment in segments], unit)
    note_order(order, name, [segment.where for segment in segments], builder.findings)
    turns = [_turn(name, index, segments[number], builder) for index, number in enumerate(order)]
    if timed:
        set_ends(turns, builder.findings)
    silence_annotations(turns, builder.findings)
    return Conversation(name, name, turns)


def _turn(name: str, index: int, segment: Segment, builder: TurnBuilder) -> Turn:
    text = spoken_text(segment.text, builder.config)
    turn = builder.turn(name, str(index), segment.speaker, text, [segment.code], segment.where)
    turn.index = index
    turn.start, turn.end = (_time(time, turn, builder) for time in (segment.start, segment.end))
    return turn


def _time(stamp: str | float, turn: Turn, builder: TurnBuilder) -> float | None:
    unit = "s" if isinstance(stamp, float) else builder.config.time_unit
    return read_time(str(stamp), turn, builder.findings, unit)
