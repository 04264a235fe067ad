"""Read Excel workbooks as tables: times and dates as text, as they would be written in a CSV."""

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from data.errors import DataError, reason
from data.importers.base.cells import column_key
from data.importers.base.extras import import_extra

SUFFIXES = (".xlsx", ".xlsm")
LARGEST = 1 << 30  # bytes of an unpacked workbook; a larger one is no corpus
SHEET = "sheet"  # column with the name of the sheet, if several sheets are read
EPOCHS = (1899, 1900, 1904)  # years in which Excel's days begin: such a date is a length of time

Cells = tuple[object, ...]
Sheets = list[tuple[str, list[tuple[int, Cells]]]]  # the name, and the rows that are not empty with their numbers


def read_workbook(path: Path, names: Sequence[str]) -> tuple[list[str], list[tuple[str, dict[str, object]]]]:
    """Return the header of a workbook, and its rows with their places ("12", or "Sheet2!12").

    The sheets with the most of the columns that are looked for are read; they must have the same header.

    Args:
        path: the file.
        names: columns that are looked for.

    Raises:
        DataError: it is no workbook, a very large one, or the sheets have different headers.
    """
    sheets = [(title, list(_rows(rows))) for title, rows in _sheets(path)]
    sheets = [(title, rows) for title, rows in sheets if rows]
    if not sheets:
        return [], []
    wanted = {column_key(name) for name in names}
    headers = {title: _header(rows[0][1]) for title, rows in sheets}
    scores = {title: len(wanted & set(map(column_key, header))) for title, header in headers.items()}
    read = [(title, rows) for title, rows in sheets if scores[title] == max(scores.values())]
    header = headers[read[0][0]]
    for title, _ in read[1:]:
        if list(map(column_key, headers[title])) != list(map(column_key, header)):
            raise DataError(
                f"{path.name}: the sheets {read[0][0]!r} and {title!r} have different columns; keep one of them, or "
                "save them as separate files"
            )
    several = len(read) > 1
    found = []
    for title, rows in read:
        for number, cells in rows[1:]:
            values = dict(zip(header, cells, strict=False)) | ({SHEET: title} if several else {})
            found.append((f"{title}!{number}" if several else str(number), values))
    return [*header, SHEET] if several else header, found


def _sheets(path: Path) -> Iterator[tuple[str, Iterator[Cells]]]:
    openpyxl = import_extra("openpyxl", "excel", path.name)
    try:
        with ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > LARGEST:
            raise DataError(f"{path.name}: unpacks to {size:,} bytes; save it as CSV in UTF-8")
        workbook = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except DataError:
        raise
    except (OSError, BadZipFile, KeyError, ValueError, TypeError, SyntaxError) as error:
        raise DataError(
            f"{path.name}: not readable as Excel ({reason(error)}); save it again, or as CSV in UTF-8"
        ) from None
    try:
        for sheet in workbook.worksheets:
            if sheet.sheet_state == "visible":
                yield sheet.title, sheet.iter_rows(values_only=True)
    except (KeyError, ValueError, TypeError, SyntaxError) as error:
        raise DataError(f"{path.name}: damaged ({reason(error)}); save it again, or as CSV in UTF-8") from None
    finally:
        workbook.close()


def _rows(rows: Iterator[Cells]) -> Iterator[tuple[int, Cells]]:
    for number, cells in enumerate(rows, start=1):
        values = tuple(_value(cell) for cell in cells)
        if any(value not in (None, "") for value in values):
            yield number, values


def _header(cells: Cells) -> list[str]:
    return [" ".join(str(cell).split()) if cell is not None else "" for cell in cells]


def _value(cell: object) -> object:
    """Return a cell as a CSV would have it: a time as HH:MM:SS, a length of time in seconds."""
    if isinstance(cell, datetime.timedelta):
        return cell.total_seconds()
    if isinstance(cell, datetime.datetime) and cell.year in EPOCHS:
        return cell.hour * 3600 + cell.minute * 60 + cell.second + cell.microsecond / 1e6
    if isinstance(cell, datetime.time):
        return cell.isoformat()
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(sep=" ") if cell.time() != datetime.time() else cell.date().isoformat()
    return cell.isoformat() if isinstance(cell, datetime.date) else cell
