"""Importer for transcripts that people type: plain text or Word, with the speaker before each turn ("T: …", "C: …")."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

from data.corpus.config import CorpusConfig
from data.corpus.schema import JOIN, Corpus
from data.errors import DataError, reason
from data.importers.base.builder import SPEAKERS, UNKNOWN, TurnBuilder
from data.importers.base.cells import column_key, speaker_key
from data.importers.base.extras import check_package, import_extra
from data.importers.base.sessions import OtherFormatError, Segment, first_files, read_sessions
from data.importers.base.tabular import read_text
from data.importers.transcripts.speakers import names_of, split_name

SUFFIXES = (".txt", ".docx")
LARGEST = 1 << 28  # bytes of an unpacked Word file; a longer one is no transcript
SHARE = 0.5  # of the lines at the beginning of a text that must have a speaker, so that it is guessed to be a dialogue
_TIME = r"(?:\d{1,2}:\d{1,2}:\d{1,2}|\d{1,2}:\d\d)(?:[.,]\d{1,3})?"
_SPAN = rf"({_TIME})(?:\s*(?:-+>?|\u2013)\s*{_TIME})?"
_COUNT = re.compile(r"\s*\(?(\d{1,5})[.):]?\s+(?=\S)")  # the number of a line or a turn
# A turn may begin with its number and with its time, or have the time behind the name.
_FRONT = re.compile(rf"\s*(?:\(?\d{{1,5}}[.):]?\s+)?(?:[\[(]?{_SPAN}[\])]?\s*[-:]?\s*)?(.*)", re.DOTALL)
_BEHIND = re.compile(rf"([^:\t\[(]{{1,40}}?)\s*[\[(]{_SPAN}[\])]\s*:?\s*(.*)", re.DOTALL)
_ABOVE = re.compile(rf"\s*([^\W\d_][^:\t\[\]()<>]{{0,39}}?)\s+{_SPAN}\s*")  # name and time above what is said
_ONLY_TIME = re.compile(rf"\s*[\[(]?{_SPAN}[\])]?\s*")
_BOLD = re.compile(r"(\s*)(\*\*|__)([^*_]{1,40}?)(:?)\2")  # Markdown
# Without a colon: "T1 why", "(C) yes", "T - so". The name must have a role.
_SHORT = re.compile(r"[\[(]?([^\W\d_]{1,12}?)\s?(\d{1,4})?(?:[\])]|\s*[.\-\u2013\u2014]|(?=\s))\s+(\S.*)", re.DOTALL)
_NUMBERED = re.compile(r"(.*?\D)\s*(\d{1,4})")
_CODES = {"()": re.compile(r"\s*\(([^()]{1,40})\)\s*$"), "[]": re.compile(r"\s*\[([^\[\]]{1,40})\]\s*$")}
_METADATA = frozenset(  # what is before a colon in headings
    "age,client id,coder,date,duration,file,file name,gender,id,interview,length,location,notes,participant id,place,"
    "project,recording,session,session id,session no,session number,sex,site,study,time,title,topic,transcriber,"
    "transcribed by,transcript,version,visit".split(",")
)
_HEADERS = {  # names of the columns of a table in Word
    **dict.fromkeys(("time", "timestamp", "start", "starttime"), "time"),
    **dict.fromkeys(("speaker", "who", "name", "role", "interlocutor"), "speaker"),
    **dict.fromkeys(("text", "utterance", "transcript", "content", "dialogue", "dialog", "turn"), "text"),
    **dict.fromkeys(("code", "codes", "label", "labels", "behaviour", "behavior", "misccode"), "code"),
}


class _Row(NamedTuple):
    """A line of a text, a paragraph, or a row of a table."""

    where: str
    text: str
    code: str = ""


class _Line(NamedTuple):
    where: str
    time: str
    name: str  # of the speaker, if the line is not one that continues; "": none
    text: str  # behind the name
    whole: str  # the line as it is
    code: str = ""


def read_dialogue(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts as plain text or Word files.

    Args:
        source: a file or a folder of them; the file name is the session id. A line begins with the speaker and a colon
            or a tab, perhaps behind a number and a time; a line without a speaker continues the turn before it. Names
            may also be above what is said, or be short (T, C) without a colon. A Word file may have a table instead.
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
    lines = _lines(islice(_rows(path, "utf-8"), 50), lambda name: speaker_key(name) in SPEAKERS)
    counts = Counter(speaker_key(line.name) for line in lines if line.name)
    named = [line for line in lines if line.name and (counts[key := speaker_key(line.name)] > 1 or key in SPEAKERS)]
    said = len(named) + sum(not line.text for line in named)  # a name above what is said
    return bool(named) and said >= SHARE * len(lines)


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    def has_role(name: str) -> bool:
        return builder.role(name, path.stem) != UNKNOWN

    lines = _without_turn_numbers(_lines(_rows(path, builder.config.encoding), has_role))
    names = names_of([f"{line.name}: {line.text}" if line.name else line.whole for line in lines], builder, path.stem)
    segments: list[Segment] = []
    for line in lines:
        if line.name and speaker_key(line.name) in names:
            segments.append(Segment(line.where, line.name, line.text, line.time, code=line.code))
        elif segments:  # what comes before the first speaker is a heading
            segments[-1] = segments[-1]._replace(text=f"{segments[-1].text} {line.whole}")
    if not segments:
        raise OtherFormatError(
            f"{path.name}:1: no line begins with a speaker; write each turn as 'T: text', or name the speakers in "
            "roles, e.g. --set roles.T=therapist --set roles.C=client"
        )
    return [_coded(segment, builder.config.line_codes) for segment in segments]


def _coded(segment: Segment, brackets: str | None) -> Segment:
    """Return a turn with the codes in brackets at its end as its code, if the settings say that they are codes."""
    codes: list[str] = []
    text = segment.text
    while brackets is not None and (match := _CODES[brackets].search(text)):
        codes.insert(0, match[1])
        text = text[: match.start()]
    return segment._replace(text=text, code=JOIN.join(codes)) if codes else segment


def _lines(rows: Iterable[_Row], has_role: Callable[[str], bool]) -> list[_Line]:
    """Return the lines with their speakers, without headings, numbers of lines, and lines that only have a time.

    Names without a colon are only looked for if no line has a colon behind the name of a speaker.
    """
    kept = _without_heading(_without_line_numbers(list(rows)), has_role)
    lines: list[_Line] = []
    time = ""
    for row in kept:
        if only := _ONLY_TIME.fullmatch(row.text):
            time = only[1].replace(",", ".")
            continue
        line = _line(row)
        lines.append(line._replace(time=line.time or time) if line.name else line)
        time = "" if line.name else time
        if not line.name and time and has_role(line.whole):  # a name on a line of its own, below its time
            lines[-1], time = line._replace(name=line.whole, text="", time=time), ""
    if any(line.name and has_role(line.name) for line in lines):
        return lines
    counts = Counter(speaker_key(line.name) for line in lines if line.name)
    if any(count > 1 for count in counts.values()):
        return lines
    for read in (_alone, _short):
        found = [read(line, has_role) for line in lines]
        named = [line for line in found if line.name]
        said = len(named) + sum(not line.text for line in named)
        if len({speaker_key(line.name) for line in named}) > 1 and said >= SHARE * len(found):
            return found
    return lines


def _alone(line: _Line, has_role: Callable[[str], bool]) -> _Line:
    name = line.whole.strip(" *_[]().")
    return line._replace(name=name, text="") if has_role(name) else line._replace(name="")


def _short(line: _Line, has_role: Callable[[str], bool]) -> _Line:
    match = _SHORT.fullmatch(line.text if not line.name else line.whole)
    if match is None or not has_role(match[1]):
        return line._replace(name="")
    return line._replace(
        name=f"{match[1]}{match[2] or ''}" if has_role(match[1] + (match[2] or "")) else match[1], text=match[3]
    )


def _without_line_numbers(rows: list[_Row]) -> list[_Row]:
    """Return the rows without their numbers if nearly every row has one and they count."""
    numbers = [int(match[1]) for row in rows if (match := _COUNT.match(row.text))]
    filled = sum(bool(row.text.strip()) for row in rows)
    if len(numbers) < 3 or len(numbers) < 0.9 * filled or sorted(set(numbers)) != numbers:
        return rows
    return [row._replace(text=_COUNT.sub("", row.text, count=1)) for row in rows]


def _without_heading(rows: list[_Row], has_role: Callable[[str], bool]) -> list[_Row]:
    """Return the rows that have text, without a heading such as "Session: 5", "Date: 3 May", "Client: Sam".

    Without an empty line behind it only the lines with words such as session and date are known to be the heading.
    """
    filled = [bool(row.text.strip()) for row in rows]
    first = next((number for number, has_text in enumerate(filled) if has_text), len(rows))
    blank = next((number for number in range(first, len(rows)) if not filled[number]), len(rows))
    names = [speaker_key(line.name) for line in map(_line, rows[first:blank])]
    facts = sum(name in _METADATA and not has_role(name) for name in names)
    if facts > 1 and len(set(names)) == len(names) and any(filled[blank:]):
        first = blank
    elif facts:
        first += next(number for number, name in enumerate([*names, ""]) if name not in _METADATA or has_role(name))
    return [row for row in rows[first:] if row.text.strip()]


def _line(row: _Row) -> _Line:
    text = _BOLD.sub(r"\1\3\4", row.text, count=1)
    match = _FRONT.fullmatch(text)
    time, rest = (match[1] or "", match[2]) if match else ("", text)
    if behind := _BEHIND.fullmatch(rest):
        time, rest = time or behind[2], f"{behind[1]}: {behind[3]}"
    elif above := _ABOVE.fullmatch(text):
        time, rest = above[2], f"{above[1]}:"
    name, said = split_name(rest) or ("", rest)
    # Only a turn has its number and time in front; "10 years ago" continues one.
    return _Line(row.where, time.replace(",", "."), name, said, row.text.strip(), row.code)


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


def _rows(path: Path, encoding: str) -> Iterator[_Row]:
    if path.suffix.lower() == ".docx":
        yield from _word(path)
        return
    for number, line in enumerate(read_text(path, encoding).splitlines(), start=1):
        yield _Row(f"{path.name}:{number}", line)


def _word(path: Path) -> Iterator[_Row]:
    """Yield the paragraphs of a Word file, and the rows of its tables as "time speaker: text".

    Raises:
        DataError: it is no Word file, or a very large one.
    """
    docx = import_extra("docx", "word", path.name)
    try:
        check_package(path, "Word", ".docx", LARGEST, ", which is no transcript; save it as text")
        document = docx.Document(str(path))
    except DataError:
        raise
    except (OSError, BadZipFile, KeyError, ValueError, SyntaxError) as error:
        raise DataError(f"{path.name}: not readable as Word ({reason(error)}); save it again, or as text") from None
    for number, part in enumerate(document.iter_inner_content(), start=1):
        where = f"{path.name}:{number}"
        if hasattr(part, "rows"):
            yield from _table(where, [[" ".join(cell.text.split()) for cell in row.cells] for row in part.rows])
            continue
        bold = "".join(run.text for run in takewhile(lambda run: run.bold or not run.text.strip(), part.runs)).strip()
        text = part.text
        if bold and ":" not in bold and text.strip() != bold and not text.strip()[len(bold) :].lstrip().startswith(":"):
            text = text.replace(bold, f"{bold}:", 1)  # the name is in bold, without a colon
        for line in text.split("\n"):  # a line break within a paragraph
            yield _Row(where, line)


def _table(where: str, grid: list[list[str]]) -> Iterator[_Row]:
    """Yield the rows of a table whose first row names the columns, or whose columns are time, speaker and text."""
    columns: dict[str, int] = {}
    for index, cell in enumerate(grid[0] if grid else ()):
        columns.setdefault(_HEADERS.get(column_key(cell), ""), index)
    if {"speaker", "text"} <= columns.keys():
        for row in grid[1:]:
            time, speaker, text, code = (
                row[columns[name]] if name in columns else "" for name in ("time", "speaker", "text", "code")
            )
            yield _Row(where, f"{time} {speaker}: {text}" if speaker else text, code)
        return
    for row in grid:
        cells = list(dict.fromkeys(cell for cell in row if cell))  # merged cells are repeated
        if len(cells) > 2 and re.fullmatch(r"\d{1,5}[.)]?", cells[0]):
            del cells[0]  # the number of the row
        time = cells.pop(0) if len(cells) > 2 and _ONLY_TIME.fullmatch(cells[0]) else ""
        joined = f"{cells[0]}: {' '.join(cells[1:])}" if len(cells) > 1 else " ".join(cells)
        yield _Row(where, f"{time} {joined}")
