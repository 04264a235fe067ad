"""Read tables (CSV, TSV, JSONL, Parquet) as rows of text, each with its position "file:line"."""

import codecs
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.issues import BuildError, Finding
from data.corpus.schema import JOIN
from data.errors import DataError, reason

SEPARATED = (".csv", ".tsv", ".tab", ".txt")
LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
Records = Iterable[tuple[int, dict[str, object]]]  # line and cells of every row
csv.field_size_limit(1 << 24)  # characters; a whole transcript in one cell is longer than the default


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its cells as stripped text; an empty or absent cell is ""."""

    where: str  # "file:line"; for Parquet the row number from 1
    cells: dict[str, str]

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
    path: Path, needed: Sequence[str], config: CorpusConfig, optional: Sequence[str] = (), advice: str = ""
) -> list[Row]:
    """Return all rows of a table that are not empty.

    Args:
        path: the file; its suffix determines the format.
        needed: columns that the file must have.
        config: settings; gives the encoding.
        optional: columns that are read if the file has them; only then they are in the `cells` of a row.
        advice: appended to the message about a missing column.

    Raises:
        DataError: the file cannot be read, has no rows or lacks a column, or a row is incomplete.
    """
    suffix = path.suffix.lower()
    rows: Records
    if suffix in PARQUET:
        header, rows = _parquet(path)
    elif suffix in LINES:
        header, rows = _json_lines(path, config.encoding)
    elif suffix in SEPARATED:
        header, rows = _separated(path, config.encoding)
    else:
        supported = ", ".join((*SEPARATED, *LINES, *PARQUET))
        raise DataError(f"{path}: the suffix {suffix!r} is not supported ({supported}); save it as CSV in UTF-8")
    if not header:
        raise DataError(f"{path}: the file is empty; check the path of the source")
    _refuse_missing(path, header, needed, advice)
    columns = [*needed, *(name for name in optional if name in header)]
    read = []
    for line, cells in rows:
        where = f"{path.name}:{line}"
        row = Row(where, {name: _cell(cells.get(name), where, name) for name in columns})
        if any(row.cells.values()):
            read.append(row)
    if not read:
        raise DataError(f"{path}: no rows; check the path of the source")
    return read


def read_text(path: Path, encoding: str) -> str:
    """Return the text of a file without byte order mark.

    Raises:
        DataError: the file cannot be read, or the encoding is unknown.
        BuildError: F_ENCODING, with the first byte that cannot be decoded.
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
            f"byte {start} (0x{raw[start]:02x}) is not valid {encoding.upper()}; save it as UTF-8 or set encoding, "
            "e.g. --set encoding=cp1252"
        )
        raise BuildError(f"F_ENCODING {where}: {message}", [Finding("F_ENCODING", where, "", message)]) from None


def _cell(value: object, where: str, column: str) -> str:
    if isinstance(value, bytes | dict):
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

    Raises:
        DataError: a row has no session.
    """
    sessions: dict[str, list[Row]] = {}
    for row in rows:
        sessions.setdefault(row.need(column), []).append(row)
    return sessions


def agreed(rows: Iterable[Row], column: str | None, code: str = "") -> str | None:
    """Return the value of a column that is the same in all rows of a session, ignoring case; None if all are empty.

    Raises:
        DataError: two rows have different values; a BuildError if a `code` of findings is given.
    """
    first: Row | None = None
    for row in rows:
        if not row[column]:
            continue
        first = first or row
        if row[column].lower() != first[column].lower():
            message = f"{column} is {row[column]!r}, but {first[column]!r} at {first.where}; a session has only one"
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
        raise DataError(f"{path.name}:1: column {twice[0]} occurs twice; rename one of them")


def _separated(path: Path, encoding: str) -> tuple[list[str], Records]:
    text = read_text(path, encoding)
    head = text.partition("\n")[0]
    # The header shows the separator, because column names do not contain one.
    separator = next((mark for mark in ("\t", ",", ";") if mark in head), ",")
    records = _records(path.name, text, separator)
    header = [name.strip() for name in next(records, (1, []))[1]]

    def rows() -> Iterator[tuple[int, dict[str, object]]]:
        for line, cells in records:
            if len(cells) < len(header):
                raise DataError(f"{path.name}:{line}: the row has fewer cells than the header; fix or remove it")
            if any(cells[len(header) :]):
                raise DataError(
                    f"{path.name}:{line}: the row has more cells than the header; quote text that contains commas"
                )
            yield line, dict(zip(header, cells, strict=False))

    return header, rows()


def _records(name: str, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of every record that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}:{line}: not readable as CSV ({error}); look for an unclosed quote") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells


def _json_lines(path: Path, encoding: str) -> tuple[list[str], Records]:
    rows: list[tuple[int, dict[str, object]]] = []
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


def _parquet(path: Path) -> tuple[list[str], Records]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet ({reason(error)}); check the path of the source") from None
    return table.column_names, list(enumerate(table.to_pylist(), start=1))
