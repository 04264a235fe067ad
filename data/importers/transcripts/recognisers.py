"""Importer for the JSON of speech recognisers with speakers: one file per session, or a manifest of NeMo for several.

The formats `whisperx` and `recogniser` are one reader with the table `SHAPES`. `whisperx` keeps its name, also because
other programs write its segments, not all of them in seconds (`time_unit`). A segment whose words have several speakers
is split where the speaker changes.
"""

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError, reason
from data.importers.base.builder import TurnBuilder
from data.importers.base.sessions import OtherFormatError, Segment, first_files, read_sessions
from data.importers.base.tabular import as_text, read_text
from data.importers.transcripts.shapes import LINES, SHAPES, Json, Shape
from data.importers.transcripts.speakers import no_speakers, timeline_of
from data.importers.transcripts.words import split, with_speakers

SUFFIXES = (".json", ".jsonl", ".ndjson")
_HEAD = 1 << 16  # bytes of a file of lines that are read to guess its format
_MEDIA = ("source", "audio_url", "audio_file", "recording")  # keys with the file or the address of the recording


def read_whisperx(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of WhisperX and its relatives; a segment may also have a `label`, one word or a list of words.

    Args:
        source: a JSON file or a folder of them; the file name is the session id. A file `<session>.rttm` beside one
            without speakers says who speaks.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps SPEAKER_00 to a role.

    Raises:
        DataError: a file cannot be read or has no segments or no speakers, or there are no recordings.
    """
    return read_sessions(TurnBuilder("whisperx", config), source, audio, SUFFIXES, _parse)


def read_recogniser(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of any recogniser of `SHAPES`; see `read_whisperx`."""
    return read_sessions(TurnBuilder("recogniser", config), source, audio, SUFFIXES, _parse)


def is_whisperx(source: Path) -> bool:
    """Return whether a source is a JSON file with segments, or a folder of such files."""
    return _shape_at(source) is SHAPES[0]


def is_recogniser(source: Path) -> bool:
    """Return whether a source is a JSON file of a recogniser, or a folder of such files."""
    return _shape_at(source) is not None


def _shape_at(source: Path) -> Shape | None:
    """Return the shape of the first file that has one: a folder may contain other files, such as settings."""
    for path in first_files(source, SUFFIXES):
        try:
            shape = _shape(_first_line(path) if path.suffix.lower() != ".json" else _content(path, "utf-8"))
        except DataError:
            continue
        if shape is not None:
            return shape
    return None


def _shape(content: Json) -> Shape | None:
    return next((shape for shape in SHAPES if shape.matches(content)), None)


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    content = _content(path, builder.config.encoding)
    shape = _shape(content)
    if shape is None:
        known = ", ".join(dict.fromkeys(shape.name for shape in SHAPES))
        has = ", ".join(list(content)[:6]) or "nothing"
        raise OtherFormatError(
            f"{path.name}:1: no segments of a recogniser that is known ({known}); it has {has}; give transcripts, and "
            "remove other files and those without speech"
        )
    is_whisper = shape is SHAPES[0]
    placed = []
    for index, segment in enumerate(shape.segments(content)):
        where = f"{path.name}:{index + 1}" if LINES in content else f"{path.name}:segments[{index}]"
        if segment is not None:
            placed.append((where, segment))
        elif is_whisper:
            raise DataError(f"{where}: the segment has no text; export the file again, or remove the segment")
    if not placed and not is_whisper:
        raise OtherFormatError(f"{path.name}:1: output of {shape.name} without words; export it with its words")
    for session in dict.fromkeys(segment.session for _, segment in placed):
        rows = [row for row, (_, segment) in enumerate(placed) if segment.session == session]
        segments = [placed[row][1] for row in rows]
        if any(segment.has_speaker for segment in segments):
            continue
        timeline = timeline_of(path, builder, session)
        if timeline is None:
            raise no_speakers(path, f"output of {shape.name}", session)
        named = with_speakers(segments, timeline, builder.config.time_unit)
        for row, segment in zip(rows, named, strict=True):
            placed[row] = (placed[row][0], segment)
    recording = _recording(content)
    return [
        part._replace(recording=recording)
        for where, segment in placed
        for part in split(segment, where, segment.session or path.stem, builder)
    ]


def _recording(content: Json) -> str:
    """Return the path of the file that was transcribed, if the output has it or its address."""
    address = next((as_text(content[key]) for key in _MEDIA if isinstance(content.get(key), str)), "")
    return unquote(urlsplit(address).path) if "://" in address else address


def _content(path: Path, encoding: str) -> Json:
    """Return the JSON of a file; a list, or lines of JSON, are `LINES`.

    Raises:
        DataError: it is no JSON object, list or lines of them.
    """
    text = read_text(path, encoding)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        lines = _json_lines(text) if error.msg == "Extra data" else None
        if lines is None:
            raise DataError(
                f"{path.name}:{error.lineno}: not readable as JSON (column {error.colno}: {error.msg}); export it again"
            ) from None
        return {LINES: lines}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}:1: not readable as JSON ({reason(error)}); export it again") from None
    if isinstance(content, dict) and path.suffix.lower() == ".json" and "audio_filepath" not in content:
        return content
    return {LINES: content if isinstance(content, list) else [content]}


def _json_lines(text: str) -> list[object] | None:
    try:
        return [json.loads(line) if line.strip() else None for line in text.splitlines()]
    except (ValueError, RecursionError):
        return None


def _first_line(path: Path) -> Json:
    with path.open("rb") as file:
        lines = file.read(_HEAD).decode("utf-8-sig", errors="replace").splitlines()
    return {LINES: _json_lines(lines[0]) or []} if lines else {}
