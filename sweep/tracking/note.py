"""The note of a sweep's MLflow run: its leaderboard with links to the runs, and how each trial ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.formats import markdown_text
from sweep.analysis.leaderboard import leaderboard
from sweep.analysis.view import to_markdown
from sweep.config.schema import Config
from sweep.search.study import TrialRecord

MAX_LENGTH = 8000  # characters of a tag; the server cuts longer ones in the middle of a row


def note(
    config: Config,
    folder: Path,
    trials: Sequence[TrialRecord],
    links: Mapping[int, str] | None = None,
    views: tuple[str, str] | None = None,
) -> str:
    """Return the note in Markdown.

    Where it would be too long, the last rows and then the last reasons are left out; the pruning audit never is.

    Args:
        config: of the sweep.
        folder: of the sweep.
        trials: of its study.
        links: the address of each trial's run, by number.
        views: the addresses of the table of trials and of the charts that compare them.
    """
    board = leaderboard(config, folder, trials)
    table = to_markdown(board.compact(), {str(number): link for number, link in (links or {}).items()})
    head, rows = table[:2], table[2:]
    for doubt in board.doubts:
        head = [f"**{markdown_text(doubt)}**", "", *head]
    if views is not None:
        head = [f"[All trials by {config.search.metric}]({views[0]}), [charts]({views[1]})", "", *head]
    reasons = [f"- {markdown_text(line)}" for line in board.reasons]
    audit = (
        [f"- {markdown_text(line)}" for line in board.ceilings]
        + [f"- {line}" for line in board.audit]
        + ([f"- **{board.warning}**"] if board.warning else [])
    )
    room = MAX_LENGTH - _length([*head, *audit]) - 100  # for the line about what is left out
    shown = _fitting(rows, room)
    why = _fitting(reasons, room - _length(shown))
    missing = len(rows) - len(shown) + len(reasons) - len(why)
    more = [f"- {missing} more lines; the table of runs shows all trials"] if missing else []
    return "\n".join([*head, *shown, "", *why, *more, *([""] if why and audit else []), *audit])


def link(experiment: str, run_id: str) -> str:
    """Return the address of a run within MLflow's UI, wherever it is served."""
    return f"#/experiments/{experiment}/runs/{run_id}"


def _length(lines: Sequence[str]) -> int:
    return sum(len(line) + 1 for line in lines)


def _fitting(lines: Sequence[str], room: int) -> list[str]:
    """Return the first lines that fit."""
    fitting: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            break
        fitting.append(line)
    return fitting
