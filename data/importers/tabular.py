"""Rows of tables (CSV, TSV, JSONL, Parquet) as text, each with its place "file:line"."""

import codecs
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data.corpus.config import CorpusConfig
from data.corpus.issues import BuildError, Finding
from data.corpus.schema import JOIN
from data.errors import DataError, reason

SEPARATED = (".csv", ".tsv", ".tab", ".txt")
csv.field_size_limit(1 << 24)  # characters; a transcript in one cell is longer than the default
LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its cells as stripped text, "" where there is nothing."""

    where: str  # "file:line"; for Parquet the number of the row, from 1
    cells: dict[str, str]

    def __getitem__(self, column: str | None) -> str:
        return self.cells.get(column, "") if column else ""

    def need(self, column: str) -> str:
        """The cell, which must hold something.

        Raises:
            DataError: it is empty.
        """
        if not self[column]:
            raise DataError(f"{self.where}: no {column}; fill it in, or remove the row")
        return self[column]


def read_rows(
    path: Path, needed: Sequence[str], config: CorpusConfig, optional: Sequence[str] = (), advice: str = ""
) -> list[Row]:
    """All rows of a table that hold anything.

    Args:
        path: of the file; its suffix tells the format.
        needed: columns that it must have.
        config: says the encoding.
        optional: columns that are read where it has them; a row's `cells` tell.
        advice: what to do about a missing column.

    Raises:
        DataError: the file cannot be read, has no rows or lacks a column, or a row is not whole.
    """
    suffix = path.suffix.lower()
    rows: Iterable[tuple[int, dict[str, Any]]]
    if suffix in PARQUET:
        header, rows = _parquet(path)
    elif suffix in LINES:
        header, rows = _json_lines(path, config.encoding)
    elif suffix in SEPARATED:
        header, rows = _separated(path, config.encoding)
    else:
        known = ", ".join((*SEPARATED, *LINES, *PARQUET))
        raise DataError(f"{path}: {suffix or 'a name without suffix'} is not known ({known}); save it as CSV in UTF-8")
    if not header:
        raise DataError(f"{path}: the file is empty; is this the right one?")
    _refuse_missing(path, header, needed, advice)
    columns = [*needed, *(name for name in optional if name in header)]
    read = []
    for line, cells in rows:
        where = f"{path.name}:{line}"
        row = Row(where, {name: _cell(cells.get(name), where, name) for name in columns})
        if any(row.cells.values()):
            read.append(row)
    if not read:
        raise DataError(f"{path}: no rows; is this the right file?")
    return read


def read_text(path: Path, encoding: str) -> str:
    """A whole text file, without byte order mark.

    Raises:
        DataError: the file or the encoding does not exist.
        BuildError: F_ENCODING, with the first byte that is not in the encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path of the source") from None
    try:
        return raw.decode(encoding).removeprefix(codecs.BOM_UTF8.decode())
    except LookupError:
        raise DataError(f"encoding: {encoding!r} is unknown; use e.g. utf-8 or cp1252") from None
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else 0
        line = raw.count(b"\n", 0, start) + 1
        where = f"{path.name}:{line}"
        message = (
            f"byte {start} (0x{raw[start]:02x}) is not {encoding.upper()}; save it as UTF-8 or set encoding, e.g. "
            "--set encoding=cp1252"
        )
        raise BuildError(f"F_ENCODING {where}: {message}", [Finding("F_ENCODING", where, "", message)]) from None


def _cell(value: Any, where: str, column: str) -> str:
    if isinstance(value, bytes | dict):
        raise DataError(f"{where}: {column} is no text ({type(value).__name__}); write it as a string")
    return as_text(value)


def as_text(value: Any) -> str:
    """A cell as stripped text: nothing is "", whole numbers have no point, the labels of a list are joined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return JOIN.join(as_text(one) for one in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def by_conversation(rows: Iterable[Row], column: str) -> dict[str, list[Row]]:
    """Rows by the session that they belong to, both in the order of the file.

    Raises:
        DataError: a row does not say.
    """
    sessions: dict[str, list[Row]] = {}
    for row in rows:
        sessions.setdefault(row.need(column), []).append(row)
    return sessions


def agreed(rows: Iterable[Row], column: str | None, code: str = "") -> str | None:
    """What the rows of a session say alike, in upper or lower case; None where they say nothing.

    Raises:
        DataError: two of them contradict each other; a BuildError if that has a code.
    """
    first: Row | None = None
    for row in rows:
        if not row[column]:
            continue
        first = first or row
        if row[column].lower() != first[column].lower():
            message = f"{column} is {row[column]!r}, and {first[column]!r} at {first.where}; a session has one"
            if code:
                raise BuildError(f"{code} {row.where}: {message}", [Finding(code, row.where, "", message)])
            raise DataError(f"{row.where}: {message}")
    return first[column] if first else None


def _refuse_missing(path: Path, header: Sequence[str], needed: Sequence[str], advice: str) -> None:
    missing = []
    lower = {name.lower(): name for name in header}
    for name in (name for name in needed if name not in header):
        near = get_close_matches(name.lower(), lower, n=1)
        missing.append(name + (f" (did you mean {lower[near[0]]}?)" if near else ""))
    if missing:
        has = ", ".join(header)
        raise DataError(f"{path.name}:1: missing column(s) {', '.join(missing)}; the file has {has}{advice}")
    twice = [name for name in needed if header.count(name) > 1]
    if twice:
        raise DataError(f"{path.name}:1: column {twice[0]} stands twice; rename one of them")


def _separated(path: Path, encoding: str) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    text = read_text(path, encoding)
    head = text.partition("\n")[0]
    # A header tells its separator: names of columns hold none.
    separator = next((mark for mark in ("\t", ",", ";") if mark in head), ",")
    records = _records(path.name, csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    header = [name.strip() for name in next(records, (1, []))[1]]

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for line, cells in records:
            if len(cells) < len(header):
                raise DataError(f"{path.name}:{line}: the row has fewer cells than the header; mend or remove it")
            if any(cells[len(header) :]):
                raise DataError(f"{path.name}:{line}: the row has more cells than the header; quote text with commas")
            yield line, dict(zip(header, cells, strict=False))

    return header, rows()


def _records(name: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of every record that is not blank."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}:{line}: not readable as CSV ({error}); look for an open quote") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells


def _json_lines(path: Path, encoding: str) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    rows = []
    for line, text in enumerate(read_text(path, encoding).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path.name}:{line}: not readable as JSON ({reason(error)}); one object a line") from None
        if not isinstance(content, dict):
            raise DataError(f'{path.name}:{line}: not a JSON object, such as {{"text": "…"}}; one object a line')
        rows.append((line, content))
    return list(dict.fromkeys(name for _, content in rows for name in content)), rows


def _parquet(path: Path) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet ({reason(error)}); check the path of the source") from None
    return table.column_names, list(enumerate(table.to_pylist(), start=1))
