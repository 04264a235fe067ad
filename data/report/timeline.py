"""Sessions as strips of time, one lane a role: wrong times, gaps and overlaps are seen at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.corpus.schema import is_rejected, split_label
from data.report import pictures
from data.report.view import View

STRIPS = 12  # sessions that are shown
WIDTH = 1000.0  # of a strip, in its own units
THINNEST = 1.5  # mark, in the same


@dataclass(frozen=True, slots=True)
class Mark:
    """A turn in the strip of its session."""

    x: float
    width: float
    lane: int  # of the role
    colour: str
    flagged: bool
    title: str


@dataclass(frozen=True, slots=True)
class Strip:
    """A session as a strip of time."""

    name: str
    part: str
    marks: list[Mark]
    length: str
    untimed: int  # turns that have no place in it


def strips(view: View) -> list[Strip]:
    """Sessions in the order of the corpus: up to half of them those with the most flagged turns, the others drawn."""
    flagged = {name: sum(bool(view.flags[row]) for row in rows) for name, rows in view.sessions.items()}
    names = sorted(view.sessions, key=view.drawn)
    troubled = sorted(filter(flagged.get, names), key=lambda name: -flagged[name])[: STRIPS // 2]
    chosen = list(dict.fromkeys([*troubled, *names]))[:STRIPS]
    return [_strip(view, name, rows) for name, rows in view.sessions.items() if name in chosen]


def _strip(view: View, name: str, rows: Sequence[int]) -> Strip:
    """A session on its own scale, so that a time that is far off squeezes all the others."""
    starts, ends = ([view.columns[column][row] for row in rows] for column in ("t_start", "t_end"))
    if not view.timed:
        starts, ends = list(range(len(rows))), list(range(1, len(rows) + 1))
    placed = [
        (row, start, start if end is None else end)
        for row, start, end in zip(rows, starts, ends, strict=True)
        if start is not None
    ]
    first = min((0.0, *(min(start, end) for _, start, end in placed)))
    length = max((0.0, *(max(start, end) for _, start, end in placed))) - first
    scale = WIDTH / max(length, 1e-9)
    lanes = {role: lane for lane, role in enumerate(view.roles)}
    marks = [
        Mark(
            x=min(round(scale * (min(start, end) - first), 1), WIDTH - THINNEST),
            width=max(THINNEST, round(scale * abs(end - start), 1)),
            lane=lanes[view.columns["speaker"][row]],
            colour=_mark_colour(view, row),
            flagged=bool(view.flags[row]),
            title=_tooltip(view, row),
        )
        for row, start, end in placed
    ]
    shown = f"{length / 60:.1f} min" if view.timed else f"{len(rows)} turns"
    return Strip(name, view.parts[rows[0]], marks, shown, len(rows) - len(marks))


def _mark_colour(view: View, row: int) -> str:
    if is_rejected(view.flags[row]):
        return pictures.RED
    label = view.columns["label"][row]
    return pictures.GREY if label is None else view.labels[split_label(label)[0]]


def _tooltip(view: View, row: int) -> str:
    column = {name: view.columns[name][row] for name in ("id", "speaker", "label", "t_start", "t_end", "text", "flags")}
    head = f"{column['id']} {column['speaker']}: {column['label'] or 'no label'}"
    text = column["text"] if len(column["text"]) <= 80 else f"{column['text'][:79]}…"
    return "\n".join(filter(None, (head, shown_span((column["t_start"], column["t_end"])), text, column["flags"])))


def shown_span(span: tuple[float | None, float | None] | None) -> str:
    """Two times in s for people; nothing where there are none."""
    if span is None or span == (None, None):
        return ""
    return " to ".join("?" if second is None else f"{second:.2f}" for second in span) + " s"
