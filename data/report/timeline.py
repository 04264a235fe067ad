"""Timelines of sessions with one lane per role, which make wrong times, gaps and overlaps visible."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.corpus.schema import is_rejected, split_label
from data.report import charts
from data.report.columns import CorpusColumns

TIMELINES = 12  # number of sessions in the report
WIDTH = 1000.0  # of a timeline, in SVG units
MIN_MARK = 1.5  # width of a mark, in SVG units


@dataclass(frozen=True, slots=True)
class Mark:
    """A turn in the timeline of its session."""

    x: float
    width: float
    lane: int  # of the role
    colour: str
    flagged: bool
    title: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """The timeline of a session."""

    name: str
    split: str
    marks: list[Mark]
    length: str
    untimed: int  # number of turns without times


def timelines(corpus: CorpusColumns) -> list[Timeline]:
    """Return timelines in corpus order: up to half are the sessions with most flagged turns, the others are random."""
    flagged = {name: sum(bool(corpus.flags[row]) for row in rows) for name, rows in corpus.sessions.items()}
    names = sorted(corpus.sessions, key=corpus.random_key)
    most_flagged = sorted(filter(flagged.get, names), key=lambda name: -flagged[name])[: TIMELINES // 2]
    chosen = list(dict.fromkeys([*most_flagged, *names]))[:TIMELINES]
    return [_timeline(corpus, name, rows) for name, rows in corpus.sessions.items() if name in chosen]


def _timeline(corpus: CorpusColumns, name: str, rows: Sequence[int]) -> Timeline:
    """Return the timeline of a session. Its scale depends on the session, so a wrong time is visible as a gap."""
    starts, ends = ([corpus.columns[column][row] for row in rows] for column in ("t_start", "t_end"))
    if not corpus.timed:
        starts, ends = list(range(len(rows))), list(range(1, len(rows) + 1))
    placed = [
        (row, start, start if end is None else end)
        for row, start, end in zip(rows, starts, ends, strict=True)
        if start is not None
    ]
    first = min((0.0, *(min(start, end) for _, start, end in placed)))
    length = max((0.0, *(max(start, end) for _, start, end in placed))) - first
    scale = WIDTH / max(length, 1e-9)
    lanes = {role: lane for lane, role in enumerate(corpus.roles)}
    marks = [
        Mark(
            x=min(round(scale * (min(start, end) - first), 1), WIDTH - MIN_MARK),
            width=max(MIN_MARK, round(scale * abs(end - start), 1)),
            lane=lanes[corpus.columns["speaker"][row]],
            colour=_mark_colour(corpus, row),
            flagged=bool(corpus.flags[row]),
            title=_tooltip(corpus, row),
        )
        for row, start, end in placed
    ]
    duration = f"{length / 60:.1f} min" if corpus.timed else f"{len(rows)} turns"
    return Timeline(name, corpus.splits[rows[0]], marks, duration, len(rows) - len(marks))


def _mark_colour(corpus: CorpusColumns, row: int) -> str:
    if is_rejected(corpus.flags[row]):
        return charts.RED
    label = corpus.columns["label"][row]
    return charts.GREY if label is None else corpus.labels[split_label(label)[0]]


def _tooltip(corpus: CorpusColumns, row: int) -> str:
    column = {
        name: corpus.columns[name][row] for name in ("id", "speaker", "label", "t_start", "t_end", "text", "flags")
    }
    head = f"{column['id']} {column['speaker']}: {column['label'] or 'no label'}"
    text = column["text"] if len(column["text"]) <= 80 else f"{column['text'][:79]}…"
    return "\n".join(filter(None, (head, format_span((column["t_start"], column["t_end"])), text, column["flags"])))


def format_span(span: tuple[float | None, float | None] | None) -> str:
    """Return two times as "1.00 to 2.50 s"; "" for None."""
    if span is None or span == (None, None):
        return ""
    return " to ".join("?" if second is None else f"{second:.2f}" for second in span) + " s"
