"""Importer for transcripts that people type: plain text or Word, with the speaker before each turn ("T: …", "C: …")."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError, reason
from data.importers.base.builder import SPEAKERS, TurnBuilder
from data.importers.base.cells import speaker_key
from data.importers.base.extras import import_extra
from data.importers.base.sessions import OtherFormatError, Segment, first_files, read_sessions
from data.importers.base.tabular import read_text
from data.importers.transcripts.speakers import names_of, split_name

SUFFIXES = (".txt", ".docx")
LARGEST = 1 << 28  # bytes of an unpacked Word file; a longer one is no transcript
SHARE = 0.5  # of the lines at the beginning of a text that must have a speaker, so that it is guessed to be a dialogue
_TIME = r"(?:\d{1,2}:)?\d{1,2}:\d\d(?:[.,]\d{1,3})?"
# A line may begin with the number of the turn and with its time, or have the time behind the name.
_FRONT = re.compile(
    rf"\s*(?:\(?\d{{1,5}}[.):]?\s+)?(?:[\[(]?({_TIME})(?:\s*-\s*{_TIME})?[\])]?\s*[-:]?\s*)?(.*)", re.DOTALL
)
_BEHIND = re.compile(rf"([^:\t\[(]{{1,40}}?)\s*[\[(]({_TIME})[\])]\s*:?\s*(.*)", re.DOTALL)
_NUMBERED = re.compile(r"(.*?\D)\s*(\d{1,4})")


class _Line(NamedTuple):
    where: str
    time: str
    name: str  # before the colon; "": none
    text: str  # behind it
    whole: str  # the line without its time


def read_dialogue(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts as plain text or Word files.

    Args:
        source: a file or a folder of them; the file name is the session id. A line begins with the speaker and a colon
            or a tab, perhaps behind a number and a time; a line without a speaker continues the turn before it. A
            Word file may have a table with two or three columns instead: time, speaker, text.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps names to roles.

    Raises:
        DataError: a file cannot be read or has no speakers, or there are no recordings.
    """
    return read_sessions(TurnBuilder("dialogue", config), source, audio, SUFFIXES, _parse)


def is_dialogue(source: Path) -> bool:
    """Return whether a source is a Word file or a text whose lines begin with speakers, or a folder of them."""
    return any(map(_has_speakers, first_files(source, SUFFIXES)))


def _has_speakers(path: Path) -> bool:
    rows = _word(path) if path.suffix.lower() == ".docx" else _text(path, "utf-8")
    lines = [_line(text, where) for where, text in islice(rows, 50) if text.strip()]
    counts = Counter(speaker_key(line.name) for line in lines if line.name)
    named = sum(count for name, count in counts.items() if count > 1 or name in SPEAKERS)
    return named > 0 and named >= SHARE * len(lines)


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    rows = _word(path) if path.suffix.lower() == ".docx" else _text(path, builder.config.encoding)
    lines = _without_turn_numbers([_line(text, where) for where, text in rows if text.strip()])
    names = names_of([f"{line.name}: {line.text}" if line.name else line.whole for line in lines], builder, path.stem)
    segments: list[Segment] = []
    for line in lines:
        if line.name and speaker_key(line.name) in names:
            segments.append(Segment(line.where, line.name, line.text, line.time))
        elif segments:  # what comes before the first speaker is a heading
            segments[-1] = segments[-1]._replace(text=f"{segments[-1].text} {line.whole}")
    if not segments:
        raise OtherFormatError(
            f"{path.name}:1: no line begins with a speaker; write each turn as 'T: text', or name the speakers in "
            "roles, e.g. --set roles.T=therapist --set roles.C=client"
        )
    return segments


def _line(text: str, where: str) -> _Line:
    match = _FRONT.fullmatch(text)
    time, rest = (match[1] or "", match[2]) if match else ("", text)
    if behind := _BEHIND.fullmatch(rest):
        time, rest = time or behind[2], f"{behind[1]}: {behind[3]}"
    name, said = split_name(rest) or ("", rest)
    return _Line(where, time.replace(",", "."), name, said, rest)


def _without_turn_numbers(lines: list[_Line]) -> list[_Line]:
    """Return the lines with "T1", "C2" as "T", "C" if the numbers only count the turns."""
    matches = [_NUMBERED.fullmatch(line.name) if line.name else None for line in lines]
    numbered = [(match[1], match[2]) for match in matches if match is not None]
    named = sum(bool(line.name) for line in lines)
    if len(numbered) < 3 or len(numbered) < named or len(set(numbered)) < len(numbered):
        return lines
    return [
        line if match is None else line._replace(name=match[1].strip())
        for line, match in zip(lines, matches, strict=True)
    ]


def _text(path: Path, encoding: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(path, encoding).splitlines(), start=1):
        yield f"{path.name}:{number}", line


def _word(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the paragraphs of a Word file, and the rows of its tables as "speaker: text".

    Raises:
        DataError: it is no Word file, or a very large one.
    """
    docx = import_extra("docx", "word", path.name)
    try:
        with ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > LARGEST:
            raise DataError(f"{path.name}: unpacks to {size:,} bytes, which is no transcript; save it as text")
        document = docx.Document(str(path))
    except DataError:
        raise
    except (OSError, BadZipFile, KeyError, ValueError, SyntaxError) as error:
        raise DataError(f"{path.name}: not readable as Word ({reason(error)}); save it again, or as text") from None
    for number, part in enumerate(document.iter_inner_content(), start=1):
        if not hasattr(part, "rows"):
            for line in part.text.split("\n"):  # a line break within a paragraph
                yield f"{path.name}:{number}", line
            continue
        for row in part.rows:
            cells = list(dict.fromkeys(" ".join(cell.text.split()) for cell in row.cells if cell.text.strip()))
            time = cells.pop(0) if len(cells) > 2 and re.fullmatch(rf"[\[(]?{_TIME}[\])]?", cells[0]) else ""
            joined = f"{cells[0]}: {' '.join(cells[1:])}" if len(cells) > 1 else " ".join(cells)
            yield f"{path.name}:{number}", f"{time} {joined}"
