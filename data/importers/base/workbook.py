"""Read Excel workbooks as tables: times and dates as text, as they would be written in a CSV."""

import datetime
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from zipfile import BadZipFile, ZipFile

from data.errors import DataError, reason
from data.importers.base.cells import column_key
from data.importers.base.extras import check_package, import_extra

SUFFIXES = (".xlsx", ".xlsm")
LARGEST = 1 << 30  # bytes of an unpacked workbook; a larger one is no corpus
SHEET = "sheet"  # column with the name of the sheet, if several sheets are read
LARGEST_MERGED = 1 << 26  # bytes of an unpacked workbook that may be in memory, for which cells are merged
LONGEST = datetime.timedelta(days=60)  # a date that is closer to the beginning of Excel's days is a length of time
HEAD = 20  # rows in which the header is looked for; titles and notes may be above it
_MARK = re.compile(rb"<(?:\w+:)?(mergeCell|f)[ />]")

Cells = tuple[object, ...]
Rows = list[tuple[int, Cells]]  # with their numbers, without empty ones


def read_workbook(path: Path, names: Sequence[str]) -> tuple[list[str], list[tuple[str, dict[str, object]]]]:
    """Return the header of a workbook, and its rows with their places ("12", or "Sheet2!12").

    The sheets with the most of the columns that are looked for are read; they must have the same header. It is the row
    with the most of these columns. A cell that is merged with those below it counts for all their rows.

    Args:
        path: the file.
        names: columns that are looked for; without any, the widest sheet and those like it are read.

    Raises:
        DataError: it is no workbook, a very large one, the sheets have different headers, or a formula has no value.
    """
    openpyxl = import_extra("openpyxl", "excel", path.name)
    marks = _marks(path)
    wanted = {column_key(name) for name in names}
    try:
        sheets = {title: rows for title, rows in _sheets(openpyxl, path, merged=b"mergeCell" in marks) if rows}
    except DataError:
        raise
    except (OSError, BadZipFile, KeyError, ValueError, TypeError, SyntaxError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path.name}: not readable as Excel ({reason(error)}); save it again, or as CSV in UTF-8"
        ) from None
    if not sheets:
        return [], []
    tops = {title: _top(rows, wanted) for title, rows in sheets.items()}
    headers = {title: _header(sheets[title][top][1]) for title, top in tops.items()}
    scores = {title: _score(header, wanted) for title, header in headers.items()}
    read = [title for title in sheets if scores[title] == max(scores.values())]
    keys = {title: list(map(column_key, headers[title])) for title in read}
    if not wanted:
        read = [title for title in read if keys[title] == keys[read[0]]]
    for title in read[1:]:
        if keys[title] != keys[read[0]]:
            raise DataError(
                f"{path.name}: the sheets {read[0]!r} and {title!r} have different columns; keep one of them, or "
                "save them as separate files"
            )
    header, several, found = headers[read[0]], len(read) > 1, []
    if b"f" in marks:
        for title in read:
            columns = [index for index, name in enumerate(headers[title]) if column_key(name) in wanted]
            _refuse_uncomputed(openpyxl, path, title, sheets[title], columns)
    for title in read:
        for number, cells in sheets[title][tops[title] + 1 :]:
            values = dict(zip(header, cells, strict=False)) | ({SHEET: title} if several else {})
            found.append((f"{title}!{number}" if several else str(number), values))
    return [*header, SHEET] if several else header, found


def _marks(path: Path) -> set[bytes]:
    """Return whether the sheets of a workbook have merged cells (mergeCell) and formulas (f).

    Raises:
        DataError: it is no workbook, or a very large one.
    """
    found: set[bytes] = set()
    try:
        size = check_package(path, "Excel", ".xlsx", LARGEST, "; save it as CSV in UTF-8")
        with ZipFile(path) as archive:
            for name in archive.namelist():
                if not re.fullmatch(r"xl/worksheets/[^/]+\.xml", name):
                    continue
                with archive.open(name) as sheet:
                    end = b""
                    while block := sheet.read(1 << 20):
                        found |= set(_MARK.findall(end + block))
                        end = block[-40:]
    except (OSError, BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(
            f"{path.name}: not readable as Excel ({reason(error)}); save it again, or as CSV in UTF-8"
        ) from None
    if size > LARGEST_MERGED:
        found.discard(b"mergeCell")
    return found


def _sheets(openpyxl: ModuleType, path: Path, *, merged: bool, formulas: bool = False) -> Iterator[tuple[str, Rows]]:
    """Yield the title and the rows of every visible sheet."""
    workbook = openpyxl.load_workbook(path, read_only=not merged, data_only=not formulas)
    try:
        for sheet in workbook.worksheets:
            if sheet.sheet_state != "visible":
                continue
            if not merged:
                sheet.reset_dimensions()  # some programs write wrong ones, and the rest would be left out
            rows = [tuple(_value(cell, workbook.epoch) for cell in row) for row in sheet.iter_rows(values_only=True)]
            for area in sheet.merged_cells.ranges if merged else ():
                left, top, _, bottom = area.bounds
                for number in range(top, min(bottom, len(rows))):
                    row = rows[number]
                    rows[number] = (*row[: left - 1], rows[top - 1][left - 1], *row[left:])
            numbered = list(enumerate(rows, start=1))
            yield (
                sheet.title,
                numbered
                if formulas
                else [(number, row) for number, row in numbered if any(cell not in (None, "") for cell in row)],
            )
    finally:
        workbook.close()


def _refuse_uncomputed(openpyxl: ModuleType, path: Path, title: str, rows: Rows, columns: Sequence[int]) -> None:
    """Raise a DataError if a cell has a formula and no value, as programs write it that do not compute."""
    formulas = dict(next(rows for name, rows in _sheets(openpyxl, path, merged=False, formulas=True) if name == title))
    for number, cells in rows:
        for index, (cell, formula) in enumerate(zip_longest(cells, formulas.get(number, ()))):
            if index in columns and cell is None and isinstance(formula, str) and formula.startswith("="):
                raise DataError(
                    f"{path.name}:{title}!{number}: the formula {formula[:40]!r} has no stored value; open the "
                    "workbook in Excel or LibreOffice, and save it"
                )


def _top(rows: Rows, wanted: set[str]) -> int:
    """Return the position of the header."""
    return max(range(min(HEAD, len(rows))), key=lambda row: (_score(_header(rows[row][1]), wanted), -row))


def _score(header: Sequence[str], wanted: set[str]) -> int:
    names = {column_key(name) for name in header if name}
    return len(names & wanted) if wanted else len(names)


def _header(cells: Cells) -> list[str]:
    return [" ".join(str(cell).split()) if cell is not None else "" for cell in cells]


def _value(cell: object, epoch: datetime.datetime) -> object:
    """Return a cell as a CSV would have it: a time as HH:MM:SS, a length of time in seconds."""
    if isinstance(cell, datetime.timedelta):
        return cell.total_seconds()
    if isinstance(cell, datetime.datetime) and abs(cell - epoch) < LONGEST:
        return round(_days(cell, epoch) * 86_400, 3)
    if isinstance(cell, datetime.time):
        return cell.isoformat()
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(sep=" ") if cell.time() != datetime.time() else cell.date().isoformat()
    return cell.isoformat() if isinstance(cell, datetime.date) else cell


def _days(date: datetime.datetime, epoch: datetime.datetime) -> float:
    """Return the number of a date that is near the beginning of Excel's days.

    Excel's number 1 is the first of January 1900, but openpyxl counts from the 30th of December 1899, since Excel has
    a 29th of February in 1900; see openpyxl.utils.datetime.
    """
    days = (date - epoch) / datetime.timedelta(days=1)
    return days - 1 if epoch.year == 1899 and days >= 2 else days
