"""Tables of results, independent of where they are shown: `to_terminal` and `to_markdown` draw them, and so does the
macro `table` of report/page.html.j2."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.formats import markdown_text

ASCII_HEAD = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    is_text: bool = False  # aligned to the left
    group: str = ""  # what a renderer may select by, see `TableView.select`
    priority: int = 0  # order of importance in a narrow terminal, which leaves out what does not fit; 0: always shown


@dataclass(frozen=True)
class TableView:
    """A table of formatted cells."""

    columns: list[Column]
    rows: list[list[str]]
    title: str = ""
    note: str = ""
    has_best: bool = False  # whether the first row is the best of all

    @property
    def header(self) -> list[str]:
        """Return the names of the columns."""
        return [column.name for column in self.columns]

    def select(self, keep: Callable[[Column], bool]) -> "TableView":
        """Return the table with some of its columns."""
        kept = [index for index, column in enumerate(self.columns) if keep(column)]
        rows = [[row[index] for index in kept] for row in self.rows]
        return replace(self, columns=[self.columns[index] for index in kept], rows=rows)


def to_terminal(view: TableView, console: Console) -> tuple[Table, list[str]]:
    """Fit a table into a terminal.

    A wide table loses the limits of its intervals, then half of the space between columns, then columns.

    Returns:
        The table, and the names of the columns that were left out.
    """
    gap, room = 2, console.width
    if sum(widths := _widths(view, console)) + gap * (len(widths) - 1) > room:
        view = _fold_intervals(view)
        widths = _widths(view, console)
    if sum(widths) + gap * (len(widths) - 1) > room:
        gap = 1
    # In the order of their importance, columns are shown that still fit.
    used, kept = -gap, set[int]()
    for index in sorted(range(len(widths)), key=lambda index: view.columns[index].priority):
        if not view.columns[index].priority or used + gap + widths[index] <= room:
            used += gap + widths[index]
            kept.add(index)
    dropped = [column for index, column in enumerate(view.columns) if index not in kept]
    view = view.select(lambda column: column not in dropped)
    table = Table(
        title=escape(view.title) or None,
        caption=escape(view.note) or None,
        title_justify="left",
        caption_justify="left",
        box=ASCII_HEAD if console.options.ascii_only else SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
    )
    for column in view.columns:
        header = escape(column.name.replace("_", "\n"))
        table.add_column(header, justify="left" if column.is_text else "right", no_wrap=True)
    for index, row in enumerate(view.rows):
        table.add_row(*map(escape, row), style="bold green" if index == 0 and view.has_best else None)
    return table, [column.name for column in dropped]


def _widths(view: TableView, console: Console) -> list[int]:
    """Return the characters that each column needs; the console may escape some that cells hold."""
    return [
        max(
            console.render_str(escape(text)).cell_len
            for text in [*column.name.split("_"), *(row[index] for row in view.rows)]
        )
        for index, column in enumerate(view.columns)
    ]


def _fold_intervals(view: TableView) -> TableView:
    """Leave out the limits of intervals, except in columns that are always shown."""
    rows = [
        [cell.partition(" [")[0] if column.priority else cell for column, cell in zip(view.columns, row, strict=True)]
        for row in view.rows
    ]
    return replace(view, rows=rows)


def to_markdown(view: TableView, links: Mapping[str, str] | None = None) -> list[str]:
    """Return the lines of a table: its header, a rule and its rows.

    Args:
        view: the table.
        links: the address that the first cell of a row links to, by its text.
    """
    lines = [[*map(markdown_text, view.header)], ["---"] * len(view.columns)]
    for first, *others in view.rows:
        address = (links or {}).get(first)
        lines.append([f"[{first}]({address})" if address else markdown_text(first), *map(markdown_text, others)])
    return ["| " + " | ".join(line) + " |" for line in lines]
