"""Read tables (CSV, TSV, JSONL, Parquet, Excel) as rows of text, each with its position "file:line"."""

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from data.corpus.config import CorpusConfig
from data.corpus.decoding import StoredClip
from data.corpus.issues import BuildError, Finding
from data.corpus.schema import JOIN
from data.errors import DataError, listed, reason
from data.importers.base import columnar, workbook
from data.importers.base.cells import MISSING_NAME, clean_name, column_key
from data.importers.base.json_table import read_json

if TYPE_CHECKING:
    pass

SEPARATED = (".csv", ".tsv", ".tab", ".txt")
LINES = (".jsonl", ".ndjson")
PARQUET = columnar.SUFFIXES
SEP_LINE = re.compile(r"\ufeff?\"?sep=(.)\"?[ \t,;]*\r?(?:\n|\r)", re.IGNORECASE)
MARKS = (  # byte order marks; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
JSON = ".json"
OTHER = {  # usual files that are not read → what to save them as
    **dict.fromkeys((".xls", ".xlsb", ".ods", ".numbers"), ".xlsx, or as CSV in UTF-8"),
    **dict.fromkeys((".doc", ".odt", ".rtf", ".pages", ".pdf"), ".docx, or as text in UTF-8"),
    **dict.fromkeys((".sav", ".dta", ".rds", ".rdata", ".sas7bdat"), "CSV in UTF-8"),
}
SUFFIXES = (*SEPARATED, *LINES, JSON, *PARQUET, *workbook.SUFFIXES)
Records = Iterable[tuple[int | str, dict[str, object]]]  # line and cells of every row
csv.field_size_limit(1 << 24)  # characters; a whole transcript in one cell is longer than the default


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its cells as stripped text; an empty or absent cell is ""."""

    where: str  # "file:line"; for Parquet the row number from 1
    cells: dict[str, str]
    stored: dict[str, StoredClip] = field(default_factory=dict)  # audio in cells of the table

    def __getitem__(self, column: str | None) -> str:
        return self.cells.get(column, "") if column else ""

    def need(self, column: str) -> str:
        """Return the cell of a required column.

        Raises:
            DataError: the cell is empty.
        """
        if not self[column]:
            raise DataError(f"{self.where}: {column} is empty; fill it in, or remove the row")
        return self[column]


def read_rows(
    path: Path,
    needed: Sequence[str],
    config: CorpusConfig,
    optional: Sequence[str] = (),
    advice: Callable[[str], str] | None = None,
    *,
    codes: Sequence[str | None] = (),
    clips: Sequence[str | None] = (),
    may_be_empty: bool = False,
) -> list[Row]:
    """Return all rows of a table that are not empty. Names of columns match without case, spaces and underscores.

    Args:
        path: the file; its suffix determines the format.
        needed: columns that the file must have.
        config: settings; gives the encoding.
        optional: columns that are read if the file has them; only then they are in the `cells` of a row.
        advice: returns what is appended to the message about a missing column.
        codes: columns whose cells may be lists and objects.
        clips: columns whose cells may have audio.
        may_be_empty: return [] for a file with a header and no rows.

    Raises:
        DataError: the file cannot be read, has no rows or lacks a column, or a row is incomplete.
    """
    if path.is_dir():
        names = listed(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        raise DataError(f"{path}: is a folder, but the format reads one file; give one of its files ({names})")
    header, rows = _table(path, config.encoding, [*needed, *optional])
    if not header:
        raise DataError(f"{path}: the file is empty; check the path of the source")
    spelled = _spelled(header, [*needed, *optional])
    _refuse_missing(path, header, needed, spelled, advice)
    columns = [name for name in dict.fromkeys((*needed, *optional)) if name in spelled]
    read = []
    for line, cells in rows:
        where = f"{path.name}:{line}"
        stored = {name: clip for name in clips if name and isinstance(clip := cells.get(spelled[name]), StoredClip)}
        texts = {name: clip.name for name, clip in stored.items()}
        for name in columns:
            if name not in stored:
                texts[name] = _cell(cells.get(spelled[name]), where, name, name in codes)
        row = Row(where, texts, stored)
        if any(row.cells.values()):
            read.append(row)
    if not read and not may_be_empty:
        raise DataError(f"{path}: no rows; check the path of the source")
    return read


def columns_of(path: Path, encoding: str = "utf-8", names: Sequence[str] = ()) -> frozenset[str]:
    """Return the columns of a table as `column_key` writes them; empty if the suffix is not that of a table.

    Args:
        path: the file.
        encoding: of text.
        names: columns that are looked for; they say which sheets of a workbook are meant.

    Raises:
        DataError: the file cannot be read.
    """
    return (
        frozenset(map(column_key, _table(path, encoding, names)[0])) if path.suffix.lower() in SUFFIXES else frozenset()
    )


def _table(path: Path, encoding: str, names: Sequence[str]) -> tuple[list[str], Records]:
    """Return the header and the rows of a table, whose suffix decides how it is read."""
    suffix = path.suffix.lower()
    if suffix in PARQUET:
        return columnar.read_columnar(path)
    if suffix in LINES:
        return _json_lines(path, encoding)
    if suffix in SEPARATED:
        return _separated(path, encoding, names)
    if suffix == JSON:
        return read_json(path, read_text(path, encoding))
    if suffix in workbook.SUFFIXES:
        return workbook.read_workbook(path, names)
    if suffix in OTHER:
        raise DataError(f"{path}: {suffix} is not read; save it as {OTHER[suffix]}")
    raise DataError(f"{path}: the suffix {suffix!r} is not supported ({', '.join(SUFFIXES)}); save it as CSV in UTF-8")


def _spelled(header: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the column of the file by the name that is looked for: the same name, or the only similar one."""
    keys: dict[str, list[str]] = {}
    for column in header:
        keys.setdefault(column_key(column), []).append(column)
    spelled = {}
    for name in names:
        similar = keys.get(column_key(name), [])
        if name in header:
            spelled[name] = name
        elif len(set(similar)) == 1 and similar[0] not in names:
            spelled[name] = similar[0]
    return spelled


def read_text(path: Path, encoding: str) -> str:
    """Return the text of a file without byte order mark; a mark decides the encoding.

    Raises:
        DataError: the file cannot be read, or the encoding is unknown.
        BuildError: F_ENCODING, with the first byte that cannot be decoded.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path of the source") from None
    if raw.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: is a ZIP file, such as Excel and Word write, not text; save it as CSV in UTF-8")
    for mark, name in MARKS:
        if raw.startswith(mark):
            encoding = name
            break
    else:
        _refuse_wide(path, raw, encoding)
    try:
        return raw.decode(encoding).removeprefix(codecs.BOM_UTF8.decode())
    except LookupError:
        raise DataError(f"encoding: {encoding!r} is unknown; use e.g. utf-8 or cp1252") from None
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else 0
        line = raw.count(b"\n", 0, start) + 1
        where = f"{path.name}:{line}"
        wide = encoding.startswith(("utf-16", "utf-32"))
        advice = "save it as UTF-8 or set encoding, e.g. --set encoding=cp1252"
        advice = "the file is damaged, export it again" if wide else advice
        message = f"byte {start} (0x{raw[start]:02x}) is not valid {encoding.upper()}; {advice}"
        raise BuildError(f"F_ENCODING {where}: {message}", [Finding("F_ENCODING", where, "", message)]) from None


def _refuse_wide(path: Path, raw: bytes, encoding: str) -> None:
    """Raise a BuildError for UTF-16 without a byte order mark, which most encodings decode into every second letter."""
    head = raw[:2000]
    if len(head) < 4 or head.count(0) < len(head) // 4 or "16" in encoding or "32" in encoding:
        return
    wide = "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
    where, message = f"{path.name}:1", f"every second byte is 0, as in UTF-16; set encoding, --set encoding={wide}"
    raise BuildError(f"F_ENCODING {where}: {message}", [Finding("F_ENCODING", where, "", message)])


def _cell(value: object, where: str, column: str, is_code: bool = False) -> str:
    nested = isinstance(value, dict) or (
        isinstance(value, list | tuple) and any(part is not None and not isinstance(part, str) for part in value)
    )
    if is_code and nested:
        try:
            return json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            raise DataError(f"{where}: {column} is not text; write it as a string") from None
    if isinstance(value, bytes | dict | StoredClip):
        raise DataError(f"{where}: {column} is not text ({type(value).__name__}); write it as a string")
    return as_text(value)


def as_text(value: object) -> str:
    """Return a cell as stripped text: None and NaN are "", 3.0 is "3", and the elements of a list are joined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return JOIN.join(map(as_text, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def by_conversation(rows: Iterable[Row], column: str) -> dict[str, list[Row]]:
    """Group rows by their session; sessions and rows keep the order of the file.

    Names that differ in invisible characters or in the form of Unicode are one session, under the first spelling.

    Raises:
        DataError: a row has no session.
    """
    names: dict[str, str] = {}
    sessions: dict[str, list[Row]] = {}
    for row in rows:
        name = row.need(column)
        if name in MISSING_NAME:
            raise DataError(f"{row.where}: {column} is {name!r}, a missing value; fill it in, or remove the row")
        sessions.setdefault(names.setdefault(clean_name(name), name), []).append(row)
    return sessions


def agreed(rows: Iterable[Row], column: str | None, code: str = "") -> str | None:
    """Return the value of a column that is the same in all rows of a session, ignoring case; None if all are missing.

    Raises:
        DataError: two rows have different values; a BuildError if a `code` of findings is given.
    """
    first: Row | None = None
    for row in rows:
        if not row[column] or row[column] in MISSING_NAME:
            continue
        first = first or row
        if clean_name(row[column]).lower() != clean_name(first[column]).lower():
            message = f"{column} is {row[column]!r}, but {first[column]!r} at {first.where}; a session has only one"
            if code:
                raise BuildError(f"{code} {row.where}: {message}", [Finding(code, row.where, "", message)])
            raise DataError(f"{row.where}: {message}")
    return first[column] if first else None


def _refuse_missing(
    path: Path,
    header: Sequence[str],
    needed: Sequence[str],
    spelled: Mapping[str, str],
    advice: Callable[[str], str] | None,
) -> None:
    missing, first = [], ""
    lower = {name.lower(): name for name in header}
    for name in (name for name in needed if name not in spelled):
        near = get_close_matches(name.lower(), lower, n=1)
        first = first or name
        missing.append(name + (f" (did you mean {lower[near[0]]}?)" if near else ""))
    if missing:
        has = ", ".join(header)
        hint = advice(first) if advice is not None else ""
        raise DataError(f"{path.name}:1: missing column(s) {', '.join(missing)}; the file has {has}{hint}")
    twice = [spelled[name] for name in needed if header.count(spelled[name]) > 1]
    if twice:
        raise DataError(f"{path.name}:1: column {twice[0]} occurs twice; rename one of them")


def _separated(path: Path, encoding: str, names: Sequence[str]) -> tuple[list[str], Records]:
    text = read_text(path, encoding)
    mark = SEP_LINE.match(text)  # Excel's first line, which says the separator
    first = 1 if mark is None else 2
    if mark is not None:
        text = text[mark.end() :]
    separator = mark[1] if mark is not None else _separator(text, names)
    records = _records(path.name, text, separator, first)
    header = [name.strip() for name in next(records, (1, []))[1]]

    def rows() -> Iterator[tuple[int | str, dict[str, object]]]:
        for line, cells in records:
            if len(cells) < len(header):
                raise DataError(f"{path.name}:{line}: the row has fewer cells than the header; fix or remove it")
            if any(cells[len(header) :]):
                raise DataError(
                    f"{path.name}:{line}: the row has more cells than the header; quote text that contains commas"
                )
            yield line, dict(zip(header, cells, strict=False))

    return header, rows()


def _separator(text: str, names: Sequence[str]) -> str:
    """Return the separator with which the header has most of the columns that are looked for."""
    head = next(iter(text.splitlines()), "")
    wanted = {column_key(name) for name in names}

    def score(mark: str) -> tuple[int, int]:
        try:
            cells = next(csv.reader([head], delimiter=mark), [])
        except csv.Error:
            cells = []
        return len(wanted & {column_key(cell) for cell in cells}), len(cells)

    return max(("\t", ",", ";", "|"), key=score)


def _records(name: str, text: str, separator: str, first: int = 1) -> Iterator[tuple[int, list[str]]]:
    """Yield the line, counted from `first`, and the cells of every record that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + first
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}:{line}: not readable as CSV ({error}); look for an unclosed quote") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells


def _json_lines(path: Path, encoding: str) -> tuple[list[str], Records]:
    rows: list[tuple[int | str, dict[str, object]]] = []
    for line, text in enumerate(read_text(path, encoding).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path.name}:{line}: not readable as JSON ({reason(error)}); write one object per line"
            ) from None
        if not isinstance(content, dict):
            raise DataError(f'{path.name}:{line}: not a JSON object such as {{"text": "…"}}; write one object per line')
        rows.append((line, content))
    return list(dict.fromkeys(name for _, content in rows for name in content)), rows
