"""report.html of a prepared corpus: a self-contained page that depends only on the content of the corpus."""

import base64
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from data.corpus import audio
from data.corpus.issues import CODES, Finding
from data.corpus.schema import SAMPLE_RATE, SPLITS, split_label
from data.corpus.votes import AgreementSums, judgements, label_order
from data.formats import format_count
from data.preparation.validate import LONG
from data.report import charts
from data.report.columns import CorpusColumns
from data.report.summary import SplitSummary, by_code, split_summaries
from data.report.timeline import format_span, timelines
from data.shards.dataset import Shards

EXAMPLES = 5  # findings per code in the report
CLIPS = 8  # clips in the report
CLIP_SECONDS = 8.0  # maximum length of a clip in the report
FLAGGED = ("W_CLIPPED", "W_SILENT", "W_DC", "W_TOO_LONG")  # the report contains a clip of each that occurs


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its title."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class ShareColumn:
    """A label or quality in the table of splits."""

    title: str
    colour: str
    counts: list[int]  # by split, the sum is last
    shares: list[float]  # of the labelled turns, or of the sessions, of the split


@dataclass(frozen=True, slots=True)
class Clip:
    """A turn with its clip."""

    id: str
    speaker: str
    label: str | None
    text: str
    span: tuple[float | None, float | None]  # s
    flags: list[str]
    source: str  # format of the recording, "" if unknown
    split: str
    svg: str
    flac: str  # base64
    seconds: float  # length of the whole clip
    played: float  # length of the part in the report, s


@dataclass(frozen=True, slots=True)
class AlignmentSummary:
    """The effect of the forced alignment."""

    turns: int
    moved: int
    low: int  # turns with a confidence that is too low
    charts: list[Chart]


@dataclass(frozen=True, slots=True)
class VoteSummary:
    """The agreement of annotators on turns that several of them labelled."""

    name: str  # of the part: everything, a role, or a role in a split
    turns: int
    annotators: float  # mean number per turn
    unanimous: int  # turns
    agreement: float  # probability that two annotators of a turn agree
    ties: int
    figures: dict[str, float]  # one annotator against the majority of the others, and chance-corrected agreement


def corpus_html(shards: Shards, findings: Sequence[Finding]) -> str:
    """Return the report about a corpus as HTML.

    Args:
        shards: the prepared corpus.
        findings: findings of its preparation in their order.
    """
    from jinja2 import Environment, StrictUndefined

    corpus = CorpusColumns(shards)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["span"] = format_span
    template = environment.from_string((files("data.report") / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        manifest=shards.manifest,
        splits=(splits := split_summaries(shards)),
        shares=_shares(splits, corpus),
        findings=by_code(findings),
        codes=CODES,
        examples=EXAMPLES,
        red=charts.RED,
        grey=charts.GREY,
        roles=corpus.roles,
        labels=corpus.labels,
        charts=list(_charts(corpus)),
        by_role=_label_shares(corpus),
        timed=corpus.timed,
        timelines=timelines(corpus),
        alignment=_alignment(corpus),
        votes=_votes(corpus),
        clips=_clips(corpus),
    )


def _shares(splits: Sequence[SplitSummary], corpus: CorpusColumns) -> list[ShareColumn]:
    """Return a column for every label, then one for every quality."""

    def column(title: str, colour: str, counts: list[int], wholes: list[int]) -> ShareColumn:
        shares = [count / max(whole, 1) for count, whole in zip(counts, wholes, strict=True)]
        return ShareColumn(title, colour, counts, shares)

    labelled, sessions = [split.labelled for split in splits], [split.sessions for split in splits]
    return [
        *(
            column(label, colour, [split.labels[label] for split in splits], labelled)
            for label, colour in corpus.labels.items()
        ),
        *(
            column(f"quality {name}", charts.GREY, [split.qualities[name] for split in splits], sessions)
            for name in corpus.shards.manifest.qualities
        ),
    ]


def _charts(corpus: CorpusColumns) -> Iterator[Chart]:
    if any(corpus.columns["n_samples"]):
        yield from _clip_charts(corpus)
    word_counts = corpus.by_role([max(1, count) for count in corpus.word_counts])
    yield Chart("Words per turn", charts.histogram(word_counts, log=True, counts=True))
    turns = [(charts.GREY, [len(rows) for rows in corpus.sessions.values()])]
    yield Chart("Turns per session", charts.histogram(turns, counts=True))
    yield from _speaking(corpus)


def _clip_charts(corpus: CorpusColumns) -> Iterator[Chart]:
    lengths = [samples / SAMPLE_RATE or None for samples in corpus.columns["n_samples"]]
    long = sum(length is not None and length > LONG for length in lengths)
    svg = charts.histogram(corpus.by_role(lengths), log=True, mark=LONG if long else None)
    yield Chart("Length of clips, s", svg, f"{long or 'none'} longer than {LONG:g} s{' (dashed line)' if long else ''}")
    silent = ["W_SILENT" in flags for flags in corpus.flags]
    audible = [None if is_silent else level for is_silent, level in zip(silent, corpus.columns["rms_db"], strict=True)]
    if any(level is not None for level in audible):
        note = f"without {sum(silent)} silent clip(s)" if any(silent) else ""
        yield Chart("Level of clips, dB of full scale", charts.histogram(corpus.by_role(audible)), note)


def _speaking(corpus: CorpusColumns) -> Iterator[Chart]:
    """Yield a chart of the share of each role in the sessions."""
    unit, weights = ("speaking time", corpus.seconds) if any(corpus.seconds) else ("words", corpus.word_counts)
    shares: dict[str, list[float]] = {role: [] for role in corpus.roles}
    totals = dict.fromkeys(corpus.roles, 0.0)
    for rows in corpus.sessions.values():
        spoken = dict.fromkeys(corpus.roles, 0.0)
        for row in rows:
            spoken[corpus.columns["speaker"][row]] += weights[row]
        for role in corpus.roles if sum(spoken.values()) else ():
            totals[role] += spoken[role]
            shares[role].append(100 * spoken[role] / sum(spoken.values()))
    if any(totals.values()):
        svg = charts.histogram([(corpus.roles[role], shares[role]) for role in corpus.roles])
        note = ", ".join(f"{role} {total / sum(totals.values()):.0%}" for role, total in totals.items())
        yield Chart(f"Share of {unit} per session, %", svg, f"overall: {note}")


def _label_shares(corpus: CorpusColumns) -> dict[str, dict[str, tuple[int, float]]]:
    """Return role → label → number of turns, and their share of the labelled turns of the role."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    labelled = Counter[str]()
    for role, label in zip(corpus.columns["speaker"], corpus.columns["label"], strict=True):
        if label is not None:
            labelled[role] += 1
            counts[role].update(split_label(label))
    return {
        role: {label: (counts[role][label], counts[role][label] / labelled[role]) for label in labels}
        for role in sorted(counts)
        if (labels := [label for label in corpus.labels if counts[role][label]])
    }


def _alignment(corpus: CorpusColumns) -> AlignmentSummary | None:
    """Return the effect of the alignment; None if the corpus was not aligned."""
    columns = corpus.columns
    confidences = [value for value in columns["confidence"] if value is not None]
    if not confidences:
        return None
    shifts = [
        start - given
        for start, given in zip(columns["t_start"], columns["given_start"], strict=True)
        if None not in (start, given)
    ]
    pictures = [Chart("Confidence", charts.histogram([(charts.GREY, confidences)]))]
    if shifts:
        svg = charts.histogram([(charts.GREY, shifts)])
        pictures.append(Chart("Shift of the start, s", svg, f"median {np.median(np.abs(shifts)):.2f} s (absolute)"))
    low = sum("W_ALIGN_LOW" in flags for flags in corpus.flags)
    return AlignmentSummary(len(confidences), sum(shift != 0 for shift in shifts), low, pictures)


def _votes(corpus: CorpusColumns) -> list[VoteSummary]:
    """Return the agreement of annotators in the corpus, in each role, and in each role of a split, where it occurs."""
    columns = corpus.columns
    voted = [row for row, votes in enumerate(columns["votes"]) if sum(count for _, count in votes or ()) > 1]
    parts: dict[str, list[int]] = {"all": voted}
    for role in corpus.roles:
        of_role = parts[role] = [row for row in voted if columns["speaker"][row] == role]
        for split in sorted(set(corpus.splits), key=lambda name: (SPLITS.index(name) if name in SPLITS else 0, name)):
            parts[f"{role}, {split}"] = [row for row in of_role if corpus.splits[row] == split]
    return [_vote_summary(corpus, name, rows) for name, rows in parts.items() if rows]


def _vote_summary(corpus: CorpusColumns, name: str, rows: Sequence[int]) -> VoteSummary:
    columns, order = corpus.columns, label_order(corpus.labels)
    votes = [dict(columns["votes"][row]) for row in rows]
    compared = [judgements(columns["conversation"][row], given, order) for row, given in zip(rows, votes, strict=True)]
    annotators = [sum(given.values()) for given in votes]
    together = [one for turn in compared for one in turn]
    sums = AgreementSums.of(together)
    totals_N = sums.rows(together).sum(0)
    figures = sums.figures(len(set(annotators)) == 1)
    return VoteSummary(
        name=name,
        turns=len(rows),
        annotators=float(np.mean(annotators)),
        unanimous=sum(len({one.given for one in turn}) == 1 for turn in compared),
        agreement=float(np.mean([np.mean([one.agreeing for one in turn]) for turn in compared])),
        ties=sum("W_LABEL_TIE" in corpus.flags[row] for row in rows),
        figures={figure: float(value(totals_N)) for figure, value in figures.items()},
    )


def _clips(corpus: CorpusColumns) -> list[Clip]:
    """Select a clip of each code of FLAGGED that occurs, then clips of the labels and splits with the fewest so far."""
    names = corpus.columns["id"]
    left = sorted(
        (row for row, count in enumerate(corpus.columns["n_samples"]) if count),
        key=lambda row: corpus.random_key(names[row]),
    )
    chosen: list[int] = []
    seen = Counter[tuple[str, str | None]]()

    def take(row: int) -> None:
        chosen.append(row)
        left.remove(row)
        seen.update([("split", corpus.splits[row]), ("label", corpus.columns["label"][row])])

    for code in FLAGGED:
        if flagged := [row for row in left if code in corpus.flags[row]]:
            take(flagged[0])
    while left and len(chosen) < CLIPS:
        take(min(left, key=lambda row: seen["split", corpus.splits[row]] + seen["label", corpus.columns["label"][row]]))
    return [_clip(corpus, row) for row in sorted(chosen)]


def _clip(corpus: CorpusColumns, row: int) -> Clip:
    pcm = corpus.shards.pcm(row)
    assert pcm is not None
    played = pcm[: round(CLIP_SECONDS * SAMPLE_RATE)]
    columns = corpus.columns
    rate, channels = columns["source_rate"][row], columns["source_channels"][row]
    return Clip(
        id=columns["id"][row],
        speaker=columns["speaker"][row],
        label=columns["label"][row],
        text=columns["text"][row],
        span=(columns["t_start"][row], columns["t_end"][row]),
        flags=corpus.flags[row],
        source=f"from {rate} Hz, {format_count(channels, 'channel')}" if rate else "",
        split=corpus.splits[row],
        svg=charts.waveform_and_spectrogram(played),
        flac=base64.b64encode(audio.encode(played, "flac")).decode(),
        seconds=len(pcm) / SAMPLE_RATE,
        played=len(played) / SAMPLE_RATE,
    )
