"""The note of a sweep's MLflow run: its trials, ranked and linked to their runs, and how those ended that lost."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweep.analysis import leaderboard
from sweep.config.schema import Config
from sweep.search import pruning_audit
from sweep.search.study import TrialRecord

LONGEST = 8000  # characters of a tag; what is longer the server cuts, in mid-row


def note(config: Config, folder: Path, entries: Sequence[TrialRecord], links: Mapping[int, str] | None = None) -> str:
    """Markdown. Where not all of it fits, the first rows do, then reasons; what pruning may have cost always does.

    Args:
        config: of the sweep.
        folder: of the sweep.
        entries: of its ledger.
        links: to the runs of its trials, by number.
    """
    found = leaderboard.board(config, folder, entries)
    reasons = [f"- {_plain(line)}" for line in leaderboard.notes(entries)]
    warning = pruning_audit.format_warning(config, entries)
    cost = [
        *(f"- {line}" for line in pruning_audit.format_lines(config, entries)),
        *([f"- **{warning}**"] if warning else []),
    ]
    head = [_row([*map(_plain, found.header)]), _row(["---"] * len(found.header))]
    table = [_row([_linked(number, links or {}), *map(_plain, cells)]) for number, *cells in found.rows]
    room = LONGEST - _size([*head, *cost]) - 100  # for the line about what is left out
    shown = _fitting(table, room)
    why = _fitting(reasons, room - _size(shown))
    missing = len(table) - len(shown) + len(reasons) - len(why)
    more = [f"- {missing} lines more; the table of runs has all of it"] if missing else []
    return "\n".join([*head, *shown, "", *why, *more, *([""] if why and cost else []), *cost])


def link(experiment: str, run_id: str) -> str:
    """Of a run, within the UI, wherever it is served."""
    return f"#/experiments/{experiment}/runs/{run_id}"


def _linked(number: str, links: Mapping[int, str]) -> str:
    where = links.get(int(number))
    return f"[{number}]({where})" if where else number


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """Names, values and errors are neither markup nor the border of a cell."""
    return html.escape(text, quote=False).replace("|", "\\|")


def _size(lines: Sequence[str]) -> int:
    return sum(len(line) + 1 for line in lines)


def _fitting(lines: Sequence[str], room: int) -> list[str]:
    """The first lines that have room."""
    found: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            break
        found.append(line)
    return found
