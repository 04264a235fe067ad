"""report.html of a prepared corpus: one page without outside parts, the same for the same content."""

import base64
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from data.corpus import audio
from data.corpus.issues import CODES, Finding
from data.corpus.schema import SAMPLE_RATE, split_label
from data.preparation.validate import LONG
from data.report import pictures
from data.report.summary import Part, by_code, parts
from data.report.timeline import shown_span, strips
from data.report.view import View
from data.shards.dataset import Shards

EXAMPLES = 5  # findings that are shown of a code
CLIPS = 8
CLIP_SECONDS = 8.0  # that can be heard of a clip
ODD = ("W_CLIPPED", "W_SILENT", "W_DC", "W_TOO_LONG")  # a clip of each is shown


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its title."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class ShareColumn:
    """A label or quality in the table of splits."""

    title: str
    colour: str
    counts: list[int]  # by split, their sum last
    shares: list[float]  # of the split's labelled turns, or of its sessions


@dataclass(frozen=True, slots=True)
class Clip:
    """A turn to look at and to listen to."""

    turn: dict[str, Any]  # by column of the index
    part: str
    svg: str
    flac: str  # base64
    seconds: float  # of the whole clip
    heard: float  # s


def corpus_html(shards: Shards, findings: Sequence[Finding]) -> str:
    """What a person should see of a corpus before training on it.

    Args:
        shards: the prepared corpus.
        findings: of its preparation, in their order.
    """
    from jinja2 import Environment, StrictUndefined

    view = View(shards)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["span"] = shown_span
    template = environment.from_string((files("data.report") / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        manifest=shards.manifest,
        parts=(held := parts(shards)),
        shares=_shares(held, view),
        findings=by_code(findings),
        codes=CODES,
        examples=EXAMPLES,
        red=pictures.RED,
        grey=pictures.GREY,
        roles=view.roles,
        labels=view.labels,
        charts=list(_charts(view)),
        by_role=_label_shares(view),
        timed=view.timed,
        strips=strips(view),
        alignment=_alignment(view),
        votes=_votes(view),
        clips=_clips(view),
    )


def _shares(held: Sequence[Part], view: View) -> list[ShareColumn]:
    """Labels, then qualities."""

    def column(title: str, colour: str, counts: list[int], wholes: list[int]) -> ShareColumn:
        shares = [count / max(whole, 1) for count, whole in zip(counts, wholes, strict=True)]
        return ShareColumn(title, colour, counts, shares)

    labelled, sessions = [part.labelled for part in held], [part.sessions for part in held]
    return [
        *(column(label, own, [part.labels[label] for part in held], labelled) for label, own in view.labels.items()),
        *(
            column(f"quality {name}", pictures.GREY, [part.qualities[name] for part in held], sessions)
            for name in view.shards.manifest.qualities
        ),
    ]


def _charts(view: View) -> Iterator[Chart]:
    if any(view.columns["n_samples"]):
        yield from _sound_charts(view)
    words = view.by_role([max(1, words) for words in view.words])
    yield Chart("Words a turn", pictures.histogram(words, log=True, counts=True))
    turns = [(pictures.GREY, [len(rows) for rows in view.sessions.values()])]
    yield Chart("Turns a session", pictures.histogram(turns, counts=True))
    yield from _speaking(view)


def _sound_charts(view: View) -> Iterator[Chart]:
    lengths = [samples / SAMPLE_RATE or None for samples in view.columns["n_samples"]]
    long = sum(length is not None and length > LONG for length in lengths)
    svg = pictures.histogram(view.by_role(lengths), log=True, mark=LONG if long else None)
    yield Chart("Length of clips, s", svg, f"{long or 'none'} longer than {LONG:g} s{' (dashed line)' if long else ''}")
    silent = ["W_SILENT" in flags for flags in view.flags]
    levels = zip(silent, view.columns["rms_db"], strict=True)
    audible = [None if quiet else level for quiet, level in levels]
    if any(level is not None for level in audible):
        note = f"without {sum(silent)} silent" if any(silent) else ""
        yield Chart("Loudness of clips, dB of full scale", pictures.histogram(view.by_role(audible)), note)


def _speaking(view: View) -> Iterator[Chart]:
    """How much of each session its roles speak."""
    what, weights = ("speaking time", view.seconds) if any(view.seconds) else ("words", view.words)
    shares: dict[str, list[float]] = {role: [] for role in view.roles}
    totals = dict.fromkeys(view.roles, 0.0)
    for rows in view.sessions.values():
        own = dict.fromkeys(view.roles, 0.0)
        for row in rows:
            own[view.columns["speaker"][row]] += weights[row]
        for role in view.roles if sum(own.values()) else ():
            totals[role] += own[role]
            shares[role].append(100 * own[role] / sum(own.values()))
    if any(totals.values()):
        svg = pictures.histogram([(view.roles[role], shares[role]) for role in view.roles])
        note = ", ".join(f"{role} {total / sum(totals.values()):.0%}" for role, total in totals.items())
        yield Chart(f"Share of a session's {what}, %", svg, f"of all: {note}")


def _label_shares(view: View) -> dict[str, dict[str, tuple[int, float]]]:
    """Role → label → how many turns carry it, and which share of the role's labelled turns."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    labelled = Counter[str]()
    for role, label in zip(view.columns["speaker"], view.columns["label"], strict=True):
        if label is not None:
            labelled[role] += 1
            counts[role].update(split_label(label))
    return {
        role: {label: (counts[role][label], counts[role][label] / labelled[role]) for label in own}
        for role in sorted(counts)
        if (own := [label for label in view.labels if counts[role][label]])
    }


def _alignment(view: View) -> dict[str, Any] | None:
    """How the alignment moved the turns; None where there was none."""
    columns = view.columns
    confidences = [value for value in columns["confidence"] if value is not None]
    if not confidences:
        return None
    shifts = [
        start - given
        for start, given in zip(columns["t_start"], columns["given_start"], strict=True)
        if None not in (start, given)
    ]
    charts = [Chart("Confidence", pictures.histogram([(pictures.GREY, confidences)]))]
    if shifts:
        svg = pictures.histogram([(pictures.GREY, shifts)])
        charts.append(Chart("Shift of the start, s", svg, f"median {np.median(np.abs(shifts)):.2f} s either way"))
    low = sum("W_ALIGN_LOW" in flags for flags in view.flags)
    return {"turns": len(confidences), "moved": sum(shift != 0 for shift in shifts), "low": low, "charts": charts}


def _votes(view: View) -> dict[str, Any] | None:
    """How far annotators agree on turns that several of them labelled; None where there are none."""
    counts = [np.array([count for _, count in votes]) for votes in view.columns["votes"] if votes]
    several = [own for own in counts if own.sum() > 1]
    if not several:
        return None
    agreeing = [(own * (own - 1)).sum() / (own.sum() * (own.sum() - 1)) for own in several]
    return {
        "turns": len(several),
        "annotators": float(np.mean([own.sum() for own in several])),
        "unanimous": sum(len(own[own > 0]) == 1 for own in several),
        "agreement": float(np.mean(agreeing)),
        "ties": sum("W_LABEL_TIE" in flags for flags in view.flags),
    }


def _clips(view: View) -> list[Clip]:
    """One for each oddity that occurs, then those whose label and split have been seen least."""
    names = view.columns["id"]
    left = sorted(
        (row for row, count in enumerate(view.columns["n_samples"]) if count), key=lambda row: view.drawn(names[row])
    )
    chosen: list[int] = []
    seen = Counter[tuple[str, str | None]]()

    def take(row: int) -> None:
        chosen.append(row)
        left.remove(row)
        seen.update([("part", view.parts[row]), ("label", view.columns["label"][row])])

    for code in ODD:
        if odd := [row for row in left if code in view.flags[row]]:
            take(odd[0])
    while left and len(chosen) < CLIPS:
        take(min(left, key=lambda row: seen["part", view.parts[row]] + seen["label", view.columns["label"][row]]))
    return [_clip(view, row) for row in sorted(chosen)]


def _clip(view: View, row: int) -> Clip:
    pcm = view.shards.pcm(row)
    assert pcm is not None
    heard = pcm[: round(CLIP_SECONDS * SAMPLE_RATE)]
    return Clip(
        turn={name: values[row] for name, values in view.columns.items()},
        part=view.parts[row],
        svg=pictures.sound(heard),
        flac=base64.b64encode(audio.encode(heard, "flac")).decode(),
        seconds=len(pcm) / SAMPLE_RATE,
        heard=len(heard) / SAMPLE_RATE,
    )
